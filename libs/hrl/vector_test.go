package hrl

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
)

//go:embed testdata/ms-hrl-example.txt
var printedEntries string

// The rest of the published example ([MS-HRL] section 3).
const (
	printedPrev          = 324096
	printedBlockAt       = 328192
	printedBlockChecksum = 4294966991
	printedEmptyChecksum = 4294967295
	printedEOL           = 332288
)

// printedHeader is the example's header. Its printed checksum, 4294959739, does not follow from its printed fields
// under any reading of padding and open or closed state (the byte sum is at least 550 too large), so it is not
// part of the vector.
var printedHeader = Header{
	LogFormatVersion:      0x20000,
	TimeStamp:             539842380,
	CreatorApplication:    [4]byte{'c', 't', ' ', ' '},
	CreatorVersion:        0xA0000,
	CurrentSize:           printedEOL,
	EOLLocation:           printedEOL,
	MetadataSize:          4096,
	UniqueID:              uuid.MustParse("572fc7ff-1f03-49ab-b3c5-30a665b8e20c"),
	PreviousUniqueID:      uuid.MustParse("a8ae4b46-f7ad-4402-87aa-5b33e9f89c77"),
	LastModifiedTimeStamp: 539842384,
	TotalMetadataEntries:  58,
	Vhd2DataWriteGUID:     uuid.MustParse("b9be5c57-f8be-5503-98bb-6c44faf9ac87"),
}

// vector returns the printed entries in slot order (58 first) with their printed checksums.
func vector(t *testing.T) []Entry {
	t.Helper()
	var out []Entry
	for line := range strings.Lines(printedEntries) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		var id int
		var e Entry
		_, err := fmt.Sscan(line, &id, &e.MetaOperation, &e.DataLength, &e.ByteOffset, &e.TimeStamp, &e.Checksum)
		require.NoError(t, err, "line %q", line)
		require.Equal(t, 58-len(out), id)
		out = append(out, e)
	}
	require.Len(t, out, 58)
	return out
}

// exampleFile lays the example out as printed, with data made up from the entry's number.
func exampleFile(t *testing.T, eol uint64) []byte {
	t.Helper()
	file := make([]byte, printedEOL)
	h := printedHeader
	h.EOLLocation = eol
	h.encode(file[:HeaderSize])
	blockHead{}.encode(file[HeaderSize:])
	entries := vector(t)
	block := file[printedBlockAt:]
	blockHead{prev: printedPrev, valid: 58}.encode(block)
	at := 2 * HeaderSize
	for i := range entries {
		e := entries[len(entries)-1-i] // write order
		for j := range int(e.DataLength) {
			file[at+j] = byte(i + 1)
		}
		at += int(e.DataLength)
		e.encode(block[4096-(i+1)*entrySize:])
	}
	require.Equal(t, printedBlockAt, at)
	return file
}

func TestPublishedChecksums(t *testing.T) {
	for _, want := range vector(t) {
		got := want
		got.Checksum = 0
		var raw [entrySize]byte
		got.encode(raw[:])
		require.Equal(t, want, got)
		back, why := decodeEntry(raw[:])
		require.Empty(t, why)
		require.Equal(t, want, back)
	}
	var head [blockHeadSize]byte
	blockHead{prev: printedPrev, valid: 58}.encode(head[:])
	require.Equal(t, uint32(printedBlockChecksum), binary.LittleEndian.Uint32(head[blockChecksumAt:]))
	blockHead{}.encode(head[:])
	require.Equal(t, uint32(printedEmptyChecksum), binary.LittleEndian.Uint32(head[blockChecksumAt:]))
}

func TestReadPublishedExample(t *testing.T) {
	for _, closed := range []bool{true, false} {
		t.Run(fmt.Sprintf("closed=%t", closed), func(t *testing.T) {
			eol := uint64(0)
			if closed {
				eol = printedEOL
			}
			file := exampleFile(t, eol)
			r, err := Open(bytes.NewReader(file), int64(len(file)))
			require.NoError(t, err)
			require.Equal(t, closed, r.Closed())
			require.Equal(t, printedHeader.UniqueID, r.Header().UniqueID)

			var blocks []Block
			var entries []Entry
			for b, err := range r.Blocks(context.Background()) {
				require.NoError(t, err)
				entries = append(entries, b.Entries...)
				c := *b
				c.Entries = nil
				blocks = append(blocks, c)
			}
			require.Equal(t, []Block{
				{Index: 0, Position: 4096, Checksum: printedEmptyChecksum},
				{Index: 1, Position: printedBlockAt, PreviousMetadataLocation: printedPrev, ValidMetadataEntries: 58,
					Checksum: printedBlockChecksum},
			}, blocks)
			want := vector(t)
			at := int64(8192)
			for i, e := range entries {
				w := want[57-i]
				w.FilePosition = at
				require.Equal(t, w, e)
				data := make([]byte, e.DataLength)
				require.NoError(t, r.ReadData(e, data))
				require.Equal(t, bytes.Repeat([]byte{byte(i + 1)}, len(data)), data)
				at += int64(e.DataLength)
			}
			require.EqualValues(t, printedEOL, r.Tail().Position)
			require.Zero(t, r.Tail().Unproven)
		})
	}
}

// TestWriterReproducesExample appends the example's writes and compares the file with the printed layout. Only
// what Hyper-V leaves out differs: our entries carry a DataChecksum.
func TestWriterReproducesExample(t *testing.T) {
	entries := vector(t)
	clock := StampTime(printedHeader.TimeStamp)
	path := filepath.Join(t.TempDir(), "example.hrl")
	w, err := Create(path, Options{
		UniqueID: printedHeader.UniqueID, PreviousUniqueID: printedHeader.PreviousUniqueID,
		DataWriteGUID: printedHeader.Vhd2DataWriteGUID, Now: func() time.Time { return clock },
	})
	require.NoError(t, err)
	for i := range entries {
		e := entries[len(entries)-1-i]
		clock = StampTime(e.TimeStamp)
		_, err := w.Append(e.ByteOffset, bytes.Repeat([]byte{byte(i + 1)}, int(e.DataLength)))
		require.NoError(t, err)
	}
	require.EqualValues(t, printedBlockAt, w.Position())
	clock = StampTime(printedHeader.LastModifiedTimeStamp)
	require.NoError(t, w.Close())

	got, err := os.ReadFile(path)
	require.NoError(t, err)
	want := exampleFile(t, printedEOL)
	require.Len(t, got, printedEOL)
	for slot := printedBlockAt + blockHeadSize; slot < printedEOL; slot += entrySize {
		e, why := decodeEntry(got[slot:])
		if e.DataLength == 0 {
			continue
		}
		require.Empty(t, why)
		require.NotZero(t, e.DataChecksum)
		e.DataChecksum = 0
		e.encode(got[slot:]) // as Hyper-V would have written it
	}
	h, err := decodeHeader(got)
	require.NoError(t, err)
	h.CreatorApplication = printedHeader.CreatorApplication
	h.encode(got[:HeaderSize])
	require.True(t, bytes.Equal(want, got), "the whole file equals the printed example")
}

func TestGUIDLayout(t *testing.T) {
	id := uuid.MustParse("00112233-4455-6677-8899-aabbccddeeff")
	var p [16]byte
	putGUID(p[:], id)
	require.Equal(t, "33221100554477668899aabbccddeeff", fmt.Sprintf("%x", p))
	require.Equal(t, id, getGUID(p[:]))
}

func TestHeaderRoundTrip(t *testing.T) {
	var p [HeaderSize]byte
	h := printedHeader
	h.ErrorCode, h.OriginalSize, h.CurrentSize = -5, 1<<40, 1<<41
	h.encode(p[:])
	back, err := decodeHeader(p[:])
	require.NoError(t, err)
	require.Equal(t, h, back)
	require.Equal(t, time.Date(2017, 2, 8, 4, 13, 0, 0, time.UTC), StampTime(h.TimeStamp))
	require.Equal(t, h.TimeStamp, Stamp(StampTime(h.TimeStamp)))
	require.Zero(t, Stamp(time.Date(1990, 1, 1, 0, 0, 0, 0, time.UTC)))
}

func TestByteSum(t *testing.T) {
	p := bytes.Repeat([]byte{0xff}, 5000)
	for _, n := range []int{0, 1, 7, 8, 31, 32, 33, 1024, 1055, 4096, 5000} {
		require.EqualValues(t, 255*n, byteSum(p[:n]), "%d bytes", n)
	}
	for i := range p {
		p[i] = byte(i * 7)
	}
	var want uint32
	for _, b := range p[3:] {
		want += uint32(b)
	}
	require.Equal(t, want, byteSum(p[3:]))
}
