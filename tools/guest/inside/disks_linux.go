package inside

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/landfall-dr/landfall/tools/guest"
)

// Mount points and folders of the two disks.
const (
	dataMount  = "/data"
	osFolder   = "/var/lib/landfall"
	dataFolder = dataMount + "/landfall"
	runFolder  = "/run/landfall"
)

// fsState is what a file system's superblock said before it was mounted.
type fsState struct {
	Device   string `json:"device"`
	Replay   bool   `json:"replay"` // the journal holds transactions that a mount replays
	ErrCount uint32 `json:"errors"` // errors that the kernel noted since mkfs
}

// bootState is handed from boot to later verifications, in runFolder.
type bootState struct {
	OS      fsState `json:"os"`
	Data    fsState `json:"data"`
	Problem string  `json:"problem,omitempty"` // why the data disk is not mounted
}

const bootStatePath = runFolder + "/boot.json"

// Where things stand in an ext4 superblock, which begins at byte 1024.
const (
	superblockAt     = 1024
	superblockSize   = 1024
	atMagic          = 0x38
	ext4Magic        = 0xef53
	atIncompat       = 0x60
	incompatRecover  = 0x4
	atLabel          = 0x78
	labelSize        = 16
	atErrorCount     = 0x194
	lookForDisksEach = 20 * time.Millisecond
)

// readSuperblock reads a device's label and state; false when there is no ext4 on it.
func readSuperblock(device string) (label string, s fsState, ok bool) {
	f, err := os.Open(device)
	if err != nil {
		return "", s, false
	}
	defer f.Close()
	b := make([]byte, superblockSize)
	if _, err := f.ReadAt(b, superblockAt); err != nil || binary.LittleEndian.Uint16(b[atMagic:]) != ext4Magic {
		return "", s, false
	}
	label = strings.TrimRight(string(b[atLabel:atLabel+labelSize]), "\x00")
	s.Device = device
	s.Replay = binary.LittleEndian.Uint32(b[atIncompat:])&incompatRecover != 0
	s.ErrCount = binary.LittleEndian.Uint32(b[atErrorCount:])
	return label, s, true
}

// findFS waits until a block device with the label appears.
func findFS(ctx context.Context, label string) (fsState, error) {
	tick := time.NewTicker(lookForDisksEach)
	defer tick.Stop()
	for {
		devices, err := os.ReadDir("/sys/class/block")
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fsState{}, fmt.Errorf("list block devices: %w", err)
		}
		for _, d := range devices {
			if l, s, ok := readSuperblock("/dev/" + d.Name()); ok && l == label {
				return s, nil
			}
		}
		select {
		case <-ctx.Done():
			return fsState{}, fmt.Errorf("no file system %s on any disk: %w", label, ctx.Err())
		case <-tick.C:
		}
	}
}

// mountOne mounts and says what and where when it cannot.
func mountOne(source, target, fstype string, flags uintptr, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", source, target, err)
	}
	return nil
}

// portPath finds a virtio-serial port by its name; false when the machine has none.
func portPath(name string) (string, bool) {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return "", false
	}
	for _, n := range names {
		b, err := os.ReadFile(n)
		if err == nil && strings.TrimSpace(string(b)) == name {
			return "/dev/" + filepath.Base(filepath.Dir(n)), true
		}
	}
	return "", false
}

// say prints a line on the serial console and on the screen, if there is one.
func say(line string) {
	for _, path := range []string{"/dev/console", "/dev/tty1"} {
		fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		if err != nil {
			continue // no screen, or no console: then there is nowhere to complain either
		}
		_, _ = unix.Write(fd, []byte(line+"\n"))
		_ = unix.Close(fd)
	}
}

// port is a virtio-serial port that never blocks: a line that nobody takes is dropped.
type port struct{ fd int }

// openPort opens the port of the acknowledgements; false when there is none or somebody has it.
func openPort() (port, bool) {
	path, ok := portPath(guest.AckPort)
	if !ok {
		return port{-1}, false
	}
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	return port{fd}, err == nil
}

// line writes a whole line or nothing.
func (p port) line(s string) { _, _ = unix.Write(p.fd, []byte(s+"\n")) }

func (p port) close() { _ = unix.Close(p.fd) }
