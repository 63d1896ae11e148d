package hrl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// smallLog is a log of 40 entries: an empty block, two full ones and a part of one.
func smallLog(t testing.TB, closed bool) ([]byte, []logged) {
	t.Helper()
	f := &memFile{}
	w, err := newWriter(f, Options{UniqueID: testID, MetadataSize: 512, Now: func() time.Time { return testNow }})
	require.NoError(t, err)
	var want []logged
	for i := range 40 {
		p := bytes.Repeat([]byte{byte(i + 1)}, 8+i)
		pos, err := w.Append(uint64(i)<<20, p)
		require.NoError(t, err)
		want = append(want, logged{uint64(i) << 20, p, pos})
	}
	if closed {
		require.NoError(t, w.Close())
	} else {
		require.NoError(t, w.Flush())
	}
	return f.data, want
}

// TestEveryDamagedByte flips each byte of a closed and an unclosed log in turn: what is read is right or refused.
func TestEveryDamagedByte(t *testing.T) {
	for _, closed := range []bool{true, false} {
		raw, want := smallLog(t, closed)
		for i := range raw {
			raw[i] ^= 0x10
			r, err := Open(bytes.NewReader(raw), int64(len(raw)))
			if i < HeaderSize {
				require.Error(t, err, "header byte %d", i)
				require.True(t, errors.Is(err, ErrCorrupt) || errors.Is(err, ErrNotLog))
				raw[i] ^= 0x10
				continue
			}
			require.NoError(t, err)
			n := 0
			var failed error
			for e, err := range r.Entries(context.Background()) {
				if err != nil {
					failed = err
					break
				}
				require.Equal(t, want[n].off, e.ByteOffset)
				require.Equal(t, want[n].pos, e.FilePosition)
				p := make([]byte, e.DataLength)
				if err := r.ReadData(e, p); err != nil {
					failed = err
					break
				}
				require.Equal(t, want[n].data, p)
				n++
			}
			switch {
			case !closed:
				require.NoError(t, failed)
			case failed != nil:
				require.ErrorIs(t, failed, ErrCorrupt)
				var c *CorruptError
				require.ErrorAs(t, failed, &c)
				near := 512 + 64 // the damage is named within a block's length
				require.InDelta(t, i, c.Position, float64(near), "%v", failed)
			default: // only unused slots of the last block and reserved bytes are not covered
				require.Len(t, want, n)
			}
			raw[i] ^= 0x10
		}
	}
}

func TestOpenErrors(t *testing.T) {
	raw, _ := smallLog(t, true)
	open := func(p []byte) error {
		_, err := Open(bytes.NewReader(p), int64(len(p)))
		return err
	}
	require.NoError(t, open(raw))
	require.ErrorIs(t, open(nil), ErrTruncated)
	require.ErrorIs(t, open(raw[:HeaderSize-1]), ErrTruncated)
	require.ErrorIs(t, open(raw[:len(raw)-1]), ErrTruncated)
	require.ErrorIs(t, open(make([]byte, HeaderSize)), ErrNotLog)
	with := func(change func(*Header)) []byte {
		p := slices.Clone(raw)
		h, err := decodeHeader(p)
		require.NoError(t, err)
		change(&h)
		h.encode(p[:HeaderSize])
		return p
	}
	require.ErrorIs(t, open(with(func(h *Header) { h.LogFormatVersion = 0x10000 })), ErrVersion)
	require.ErrorIs(t, open(with(func(h *Header) { h.MetadataSize = 513 })), ErrCorrupt)
	require.ErrorIs(t, open(with(func(h *Header) { h.MetadataSize = 1 << 30 })), ErrCorrupt)
	require.ErrorIs(t, open(with(func(h *Header) { h.FileType = 1 })), ErrCorrupt)
	require.ErrorIs(t, open(with(func(h *Header) { h.EOLLocation = 1 })), ErrCorrupt)
	require.ErrorIs(t, open(with(func(h *Header) { h.EOLLocation = 1 << 63 })), ErrTruncated)

	p := with(func(h *Header) { h.TotalMetadataEntries++ })
	r, err := Open(bytes.NewReader(p), int64(len(p)))
	require.NoError(t, err)
	require.ErrorIs(t, drain(r), ErrCorrupt)

	// Bytes behind the end are not part of the log.
	longer := append(slices.Clone(raw), make([]byte, 100)...)
	r, err = Open(bytes.NewReader(longer), int64(len(longer)))
	require.NoError(t, err)
	require.NoError(t, drain(r))
	require.EqualValues(t, 100, r.Tail().Unproven)
}

func drain(r *Reader) error {
	for _, err := range r.Blocks(context.Background()) {
		if err != nil {
			return err
		}
	}
	return nil
}

func drainBytes(t *testing.T, raw []byte) error {
	t.Helper()
	r, err := Open(bytes.NewReader(raw), int64(len(raw)))
	require.NoError(t, err)
	return drain(r)
}

func TestCorruptErrorsNameTheirPlace(t *testing.T) {
	raw, want := smallLog(t, true)
	var pos []int64
	r, err := Open(bytes.NewReader(raw), int64(len(raw)))
	require.NoError(t, err)
	for b, err := range r.Blocks(context.Background()) {
		require.NoError(t, err)
		pos = append(pos, b.Position)
	}
	require.Len(t, pos, 4)
	for _, tc := range []struct {
		at      int64
		want    CorruptError
		message string
	}{
		{pos[2] + 8, CorruptError{Part: PartBlock, Position: pos[2], Block: 2, Entry: -1},
			fmt.Sprintf("hrl: corrupt block 2 at position %d: checksum", pos[2])},
		{pos[2] + 512 - 32, CorruptError{Part: PartEntry, Position: pos[2] + 480, Block: 2, Entry: 0},
			fmt.Sprintf("hrl: corrupt entry at position %d (block 2, entry 0)", pos[2]+480)},
	} {
		raw[tc.at] ^= 1
		err := drain(r)
		var c *CorruptError
		require.ErrorAs(t, err, &c)
		require.Contains(t, err.Error(), tc.message)
		c.Reason = ""
		require.Equal(t, tc.want, *c)
		raw[tc.at] ^= 1
	}
	// Damaged together with the block before it and with its own links, its number is not known and not guessed.
	bad := slices.Clone(raw)
	bad[pos[2]+8] ^= 1
	copy(bad[pos[3]:], []byte{0xff, 0xff})
	bad[pos[3]+511-24] ^= 1
	var c *CorruptError
	require.ErrorAs(t, drainBytes(t, bad), &c)
	require.Equal(t, CorruptError{Part: PartBlock, Position: pos[3], Block: -1, Entry: -1, Reason: c.Reason}, *c)

	raw[want[3].pos] ^= 1
	err = Inspect(context.Background(), bytes.NewReader(raw), int64(len(raw)), io.Discard, FormatTable)
	require.ErrorContains(t, err, fmt.Sprintf("corrupt data at position %d (block 1, entry 3)", want[3].pos))
}

func TestWalksStop(t *testing.T) {
	for _, closed := range []bool{true, false} {
		raw, _ := smallLog(t, closed)
		r, err := Open(bytes.NewReader(raw), int64(len(raw)))
		require.NoError(t, err)
		n := 0
		for range r.Entries(context.Background()) {
			if n++; n == 20 {
				break
			}
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		for _, err := range r.Blocks(ctx) {
			require.ErrorIs(t, err, context.Canceled)
		}
	}
}

// TestImitationsAreBounded fills an unclosed log with heads that look right and are not followed by their entries.
func TestImitationsAreBounded(t *testing.T) {
	f := &memFile{}
	w, err := newWriter(f, Options{UniqueID: testID})
	require.NoError(t, err)
	trap := make([]byte, 1<<20)
	for i := 0; i+blockHeadSize <= len(trap); i += blockHeadSize {
		blockHead{prev: uint64(4096 + i), valid: 100}.encode(trap[i:])
	}
	_, err = w.Append(0, trap[:64<<10])
	require.NoError(t, err)
	require.NoError(t, w.Flush())
	_, err = w.Append(0, trap)
	require.NoError(t, err)
	_, got := readAll(t, f.data)
	require.Len(t, got, 1, "2,048 imitations hide nothing")

	f.data = append(f.data[:8192:8192], trap...)
	r, err := Open(bytes.NewReader(f.data), int64(len(f.data)))
	require.NoError(t, err)
	require.NoError(t, drain(r))
	require.Contains(t, r.Tail().Reason, "imitate")
}

// TestSearchAcrossWindows puts blocks around the borders of the search window.
func TestSearchAcrossWindows(t *testing.T) {
	for d := -36; d <= 36; d += 3 {
		f := &memFile{}
		w, err := newWriter(f, Options{UniqueID: testID})
		require.NoError(t, err)
		for range 2 {
			_, err = w.Append(0, bytes.Repeat([]byte{3}, windowSize+d))
			require.NoError(t, err)
			require.NoError(t, w.Flush())
		}
		_, got := readAll(t, f.data)
		require.Len(t, got, 2, "shifted by %d", d)
	}
}

func TestSmallRealVolume(t *testing.T) {
	dir := mountTiny(t, 256<<10)
	path := filepath.Join(dir, "a.hrl")
	w, err := Create(path, Options{UniqueID: testID})
	require.NoError(t, err)
	n := 0
	for {
		if _, err = w.Append(uint64(n)*5000, bytes.Repeat([]byte{byte(n)}, 5000)); err != nil {
			break
		}
		n++
	}
	require.ErrorIs(t, err, ErrFull)
	require.Greater(t, n, 40)
	require.NoError(t, w.Close())
	raw, err := os.ReadFile(path)
	require.NoError(t, err)
	r, got := readAll(t, raw)
	require.True(t, r.Closed())
	require.Len(t, got, n)
}

func FuzzReader(f *testing.F) {
	for _, closed := range []bool{true, false} {
		raw, _ := smallLog(f, closed)
		f.Add(raw)
		f.Add(raw[:len(raw)-300])
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		if len(raw) >= HeaderSize { // let the fuzzer past the header's checksum
			if h, err := decodeHeader(raw); errors.Is(err, ErrCorrupt) {
				h.encode(raw[:HeaderSize])
			}
		}
		r, err := Open(bytes.NewReader(raw), int64(len(raw)))
		if err != nil {
			return
		}
		at := int64(HeaderSize)
		for e, err := range r.Entries(context.Background()) {
			if err != nil {
				require.ErrorIs(t, err, ErrCorrupt)
				break
			}
			require.GreaterOrEqual(t, e.FilePosition, at)
			at = e.FilePosition + int64(e.DataLength)
			require.LessOrEqual(t, at, int64(len(raw)))
		}
		var out bytes.Buffer
		_ = Inspect(context.Background(), bytes.NewReader(raw), int64(len(raw)), &out, FormatJSON)
		require.True(t, json.Valid(out.Bytes()), "%s", out.String())
	})
}
