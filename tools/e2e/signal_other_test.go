//go:build !unix

package e2e

func (p *process) suspend() error { return nil }
func (p *process) resume() error  { return nil }
