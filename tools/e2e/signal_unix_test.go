//go:build unix

package e2e

import "syscall"

// suspend stops the process where it is; resume lets it go on.
func (p *process) suspend() error { return p.signal(syscall.SIGSTOP) }
func (p *process) resume() error  { return p.signal(syscall.SIGCONT) }

func (p *process) signal(s syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return errNotYet
	}
	return p.cmd.Process.Signal(s)
}
