package guestvm

import "syscall"

// dieWithParent makes the kernel kill QEMU when the test's process dies: no machine is left behind.
func dieWithParent() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }
