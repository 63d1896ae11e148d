package qemutarget

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
)

// processes are the QEMUs whose command line has the machine's UUID, whatever became of lock, pid file and sockets.
func processes(id string) (pids []int) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && hasIdentity(pid, id) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// hasIdentity reads the command line: "-uuid", then the UUID, as two arguments of their own.
func hasIdentity(pid int, id string) bool {
	raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	if err != nil {
		return false
	}
	args := bytes.Split(raw, []byte{0})
	i := slices.IndexFunc(args, func(a []byte) bool { return string(a) == "-uuid" })
	return i > 0 && i+1 < len(args) && string(args[i+1]) == id
}

// kill ends a process by force if it still is the machine: the handle is taken before the command line is looked at, so
// a pid that is used again in between is not hit.
func kill(pid int, id string) error {
	p, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	defer func() { _ = p.Release() }()
	if !hasIdentity(pid, id) {
		return nil
	}
	return p.Signal(syscall.SIGKILL)
}
