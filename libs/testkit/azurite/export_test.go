package azurite

// CloseStdin does what the death of the starting process does.
func (s *Server) CloseStdin() { s.stdin.Close() }

// Ended says whether the process is gone.
func (s *Server) Ended() bool {
	select {
	case <-s.exited:
		return true
	default:
		return false
	}
}
