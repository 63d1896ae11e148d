package e2e

import (
	"os/exec"
	"syscall"
)

// dieWithUs ends the process when a test that timed out ends without clean-up.
func dieWithUs(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }
