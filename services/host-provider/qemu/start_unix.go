//go:build unix

package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
)

// startDetached runs a command in a session of its own, as nobody's child here: it is not waited for and outlives this
// process. Its output goes to a new file at log.
func startDetached(ctx context.Context, argv []string, dir, log string) (pid int, err error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, err
	}
	defer out.Close()
	c := exec.CommandContext(ctx, "/bin/sh", append([]string{"-c", `"$@" </dev/null >&2 & echo $!`, "sh"}, argv...)...)
	c.Dir, c.Stderr, c.SysProcAttr = dir, out, &syscall.SysProcAttr{Setsid: true}
	answer, err := c.Output()
	if err != nil {
		return 0, fmt.Errorf("run the shell: %w", err)
	}
	return strconv.Atoi(string(bytes.TrimSpace(answer)))
}

// running says whether there is such a process.
func running(pid int) bool {
	err := syscall.Kill(pid, 0)
	return err == nil || errors.Is(err, syscall.EPERM)
}
