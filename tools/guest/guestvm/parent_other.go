//go:build !linux

package guestvm

import "syscall"

// dieWithParent has no equivalent here: Close ends QEMU.
func dieWithParent() *syscall.SysProcAttr { return nil }
