package qemu

import (
	"encoding/binary"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/testkit"
)

// writerGuest is a boot sector. It is the whole guest: it counts, and writes each number by the BIOS to sector 8 of the first
// disk, waits until that is done, then writes it to sector 8 of the second.
//
//	       xor ax,ax / mov ds,es,ss,ax / mov sp,0x7c00 / mov dword [0x8000],0
//	loop:  inc dword [0x8000]
//	       mov dl,0x80 / call write / mov dl,0x81 / call write / jmp loop
//	write: mov ax,0x4300 / mov si,packet / int 0x13 / ret
//	packet: 16 bytes: 1 sector, from 0:8000, to sector 8
var writerGuest = []byte{
	0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0xfb, 0x66, 0xc7, 0x06,
	0x00, 0x80, 0x00, 0x00, 0x00, 0x00, 0x66, 0xff, 0x06, 0x00, 0x80, 0xb2, 0x80, 0xe8, 0x07, 0x00,
	0xb2, 0x81, 0xe8, 0x02, 0x00, 0xeb, 0xef, 0xb8, 0x00, 0x43, 0xbe, 0x30, 0x7c, 0xcd, 0x13, 0xc3,
	0x10, 0x00, 0x01, 0x00, 0x00, 0x80, 0x00, 0x00, 0x08, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
}

const counterAt = 8 * 512

// bootWriter is a lab whose guest is the writer.
func bootWriter(t testing.TB, options ...option) *lab {
	t.Helper()
	l := newLab(t, append([]option{booted}, options...)...)
	require.NoError(t, l.second.Execute(l.ctx(), "cont", nil, nil))
	return l
}

func booted(l *lab) { l.boot = true }

// install puts the boot sector on the first disk, which must be raw.
func (l *lab) install() {
	l.t.Helper()
	sector := make([]byte, 512)
	copy(sector, writerGuest)
	sector[510], sector[511] = 0x55, 0xaa
	f, err := os.OpenFile(l.image(0), os.O_WRONLY, 0)
	require.NoError(l.t, err)
	_, err = f.Write(sector)
	require.NoError(l.t, err)
	require.NoError(l.t, f.Close())
}

func (l *lab) counter(d string) uint32 { return binary.LittleEndian.Uint32(l.replica[d][counterAt:]) }

// TestOneInstant cuts while a real guest alternates between its disks: in every point the second disk has the number of the
// first, or the one before.
func TestOneInstant(t *testing.T) {
	for _, how := range []string{"q35", "pc"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			l := bootWriter(t, formats("raw", "vhdx"), func(l *lab) { l.machine = how })
			torn, last := l.cuts(t, 6)
			require.Zero(t, torn)
			require.Greater(t, last, uint32(20), "the guest hardly wrote")
		})
	}
}

// TestOneInstantPerDiskIsSeen is the negative control of the test above.
func TestOneInstantPerDiskIsSeen(t *testing.T) {
	t.Parallel()
	l := bootWriter(t, formats("raw", "vhdx"), configured(func(c *Config) { c.UnsafeOneTransactionPerDisk = true }))
	torn, _ := l.cuts(t, 10)
	require.Positive(t, torn, "disks that were cut one after the other look like one instant: the test proves nothing")
}

// cuts makes points and counts those that no instant of the guest ever was.
func (l *lab) cuts(t *testing.T, n int) (torn int, last uint32) {
	t.Helper()
	l.establish()
	p := l.next()
	_, err := l.begin(p, full)
	require.NoError(t, err)
	l.ship(p)
	_, err = l.settlePass(p, commit)
	require.NoError(t, err)
	return l.cutsOnly(t, n)
}

func (l *lab) cutsOnly(t *testing.T, n int) (torn int, last uint32) {
	t.Helper()
	var pause, total time.Duration
	for range n {
		if torn > 1 {
			break // it is seen
		}
		before := last
		testkit.Eventually(t, 20*time.Second, func() bool { // the guest goes on
			p := l.next()
			start := time.Now()
			r, err := l.cut(p)
			total += time.Since(start)
			require.NoError(t, err)
			pause = max(pause, r.Point.Pause.AsDuration())
			l.ship(p)
			_, err = l.settle(p, commit)
			require.NoError(t, err)
			first, second := l.counter("d0"), l.counter("d1")
			if second > first || first > second+1 {
				torn++
				t.Logf("torn: %d and %d", first, second)
			}
			require.GreaterOrEqual(t, first, last)
			last = first
			return last > before
		})
	}
	t.Logf("longest pause %s, cut %s on average, %d numbers", pause, total/time.Duration(max(1, l.ordinal-1)), last)
	return torn, last
}
