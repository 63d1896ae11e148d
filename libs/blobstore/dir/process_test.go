package dir

func child() bool { return false }
