package inside

import (
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/landfall-dr/landfall/tools/guest"
	"github.com/landfall-dr/landfall/tools/guest/filering"
)

// loadFiles is how many files of WriteLoad a disk keeps: the older one makes room.
const loadFiles = 2

func diskFolder(disk string) (string, error) {
	switch disk {
	case "os":
		return osFolder, nil
	case "data":
		return dataFolder, nil
	}
	return "", fmt.Errorf("disk %q: os or data", disk)
}

// WriteLoad writes one checksummed file of so many random bytes to a disk, durably.
func WriteLoad(disk string, bytes int64) (guest.Load, error) {
	dir, err := diskFolder(disk)
	if err != nil {
		return guest.Load{}, err
	}
	dir = filepath.Join(dir, loadName)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return guest.Load{}, err
	}
	began := time.Now()
	if err := makeRoom(dir); err != nil {
		return guest.Load{}, err
	}
	m := uint64(began.UnixNano())
	name := fmt.Sprintf("load-%d", m)
	sum, err := filering.Write(filepath.Join(dir, name), m, m, bytes)
	if err != nil {
		_ = os.Remove(filepath.Join(dir, ".tmp-"+name))
		return guest.Load{}, err
	}
	return guest.Load{
		Disk: disk, Name: name, Bytes: bytes, SHA256: hex.EncodeToString(sum[:]), TookMS: time.Since(began).Milliseconds(),
	}, nil
}

// makeRoom deletes the oldest files until one more may come.
func makeRoom(dir string) error {
	names, err := filepath.Glob(filepath.Join(dir, "load-*"))
	if err != nil {
		return err
	}
	slices.Sort(names) // by time: all of one length
	for len(names) >= loadFiles {
		if err := os.Remove(names[0]); err != nil {
			return err
		}
		names = names[1:]
	}
	return nil
}

// MeasureLatency writes 4 KiB blocks durably, one after the other, for a time and tells how long they took.
func MeasureLatency(disk string, during time.Duration) (guest.Latency, error) {
	dir, err := diskFolder(disk)
	if err != nil {
		return guest.Latency{}, err
	}
	const block, blocks = 4096, 1024
	path := filepath.Join(dir, loadName, ".tmp-latency") // the name of a file that verification does not look at
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return guest.Latency{}, err
	}
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, block*blocks), 0); err != nil {
		return guest.Latency{}, err
	}
	if err := f.Sync(); err != nil {
		return guest.Latency{}, err
	}
	direct, err := openDirect(path)
	if err != nil {
		return guest.Latency{}, err
	}
	defer direct.Close()
	buf, err := unix.Mmap(-1, 0, block, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return guest.Latency{}, err
	}
	var took []time.Duration
	end := time.Now().Add(during)
	for i := int64(0); time.Now().Before(end); i++ {
		buf[0], buf[block-1] = byte(i), byte(i>>8)
		began := time.Now()
		if _, err := direct.WriteAt(buf, i*7%blocks*block); err != nil {
			return guest.Latency{}, err
		}
		took = append(took, time.Since(began))
	}
	if len(took) == 0 {
		return guest.Latency{Disk: disk}, nil
	}
	slices.Sort(took)
	at := func(share float64) int64 { return took[int(share*float64(len(took)-1))].Microseconds() }
	return guest.Latency{Disk: disk, Writes: len(took), P50US: at(0.5), P99US: at(0.99), MaxUS: at(1)}, nil
}
