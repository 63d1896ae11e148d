//go:build !linux

package dir

import (
	"encoding/binary"
	"os"
)

// counters reads and writes a state file's volatile words in place. Changes are made only by holders of the
// exclusive lock (sharedCounters is false).
type counters struct{ f *os.File }

func mapCounters(f *os.File) (*counters, error) { return &counters{f}, nil }

// slots reads both slots.
func (c *counters) slots(buf *[2 * slotBytes]byte) error {
	_, err := c.f.ReadAt(buf[:], 0)
	return err
}

func (c *counters) get(at int) (uint64, error) {
	var b [8]byte
	_, err := c.f.ReadAt(b[:], int64(at))
	return binary.LittleEndian.Uint64(b[:]), err
}

func (c *counters) set(at int, v uint64) error {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	_, err := c.f.WriteAt(b[:], int64(at))
	return err
}

func (c *counters) add(at int) error {
	v, err := c.get(at)
	if err != nil {
		return err
	}
	return c.set(at, v+1)
}

func (c *counters) close() error { return nil }
