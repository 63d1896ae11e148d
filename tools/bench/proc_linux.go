package bench

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// clockTick is the unit of processor time in /proc: 100 per second on every Linux that Go runs on.
const clockTick = 10 * time.Millisecond

// peakOfTree is the largest VmHWM among a process and its descendants, in bytes. The kernel keeps the mark itself, so
// only what a process adds in its last milliseconds can be missed.
func peakOfTree(pid int) int64 {
	peak := field(pid, "VmHWM:") * kib
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return peak
	}
	for _, t := range tasks {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, t.Name()))
		if err != nil {
			continue
		}
		for _, child := range strings.Fields(string(raw)) {
			if n, err := strconv.Atoi(child); err == nil {
				peak = max(peak, peakOfTree(n))
			}
		}
	}
	return peak
}

func field(pid int, name string) int64 {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	_, rest, found := strings.Cut(string(raw), name)
	if words := strings.Fields(rest); found && len(words) > 0 {
		n, _ := strconv.ParseInt(words[0], 10, 64) // the kernel's own number
		return n
	}
	return 0
}

// cpuOf is the processor time that a running process has used, without its children: in all, and the kernel's part.
func cpuOf(pid int) (all, system time.Duration, err error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, fmt.Errorf("processor time of %d: %w", pid, err)
	}
	words := bytes.Fields(raw[bytes.LastIndexByte(raw, ')')+1:]) // the name may hold spaces
	if len(words) < 13 {
		return 0, 0, fmt.Errorf("processor time of %d: short record", pid)
	}
	user, err := strconv.ParseInt(string(words[11]), 10, 64)
	if err != nil {
		return 0, 0, fmt.Errorf("processor time of %d: %w", pid, err)
	}
	kernel, err := strconv.ParseInt(string(words[12]), 10, 64)
	if err != nil {
		return 0, 0, fmt.Errorf("processor time of %d: %w", pid, err)
	}
	return time.Duration(user+kernel) * clockTick, time.Duration(kernel) * clockTick, nil
}

// loadAverage is the one-minute load.
func loadAverage() string {
	raw, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return ""
	}
	load, _, _ := strings.Cut(string(raw), " ")
	return load
}

// processorName is what the machine calls its processor.
func processorName() string {
	raw, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(raw), "model name")
	line, _, _ := strings.Cut(rest, "\n")
	return strings.Trim(line, " \t:")
}
