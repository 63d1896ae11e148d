package vdisk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/landfall-dr/landfall/libs/extent"
)

const mib = 1 << 20

// collect returns the extents of a disk in r.
func collect(t require.TestingT, d Disk, r extent.Range) []extent.Range {
	var out []extent.Range
	for have, err := range d.Extents(context.Background(), r) {
		require.NoError(t, err)
		out = append(out, have)
	}
	return out
}

func TestCreateOpenRoundTrip(t *testing.T) {
	for _, format := range []Format{FormatRaw, FormatVHD} {
		t.Run(string(format), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk."+string(format))
			d, err := Create(path, format, 5*mib+512)
			require.NoError(t, err)
			want := int64(5*mib + 512)
			if format == FormatVHD {
				want = 6 * mib
			}
			require.Equal(t, want, d.Size())
			require.Equal(t, want-5*mib-512, d.Padding())
			data := bytes.Repeat([]byte("landfall"), 1000)
			for _, off := range []int64{0, 3*mib + 7, want - int64(len(data))} {
				n, err := d.WriteAt(data, off)
				require.NoError(t, err)
				require.Equal(t, len(data), n)
			}
			_, err = Create(path, format, mib)
			require.ErrorIs(t, err, ErrExists)
			require.ErrorIs(t, err, fs.ErrExist)
			require.NoError(t, d.Sync())
			require.NoError(t, d.Close())

			for _, f := range []Format{format, FormatAuto} {
				r, err := Open(path, f, true)
				require.NoError(t, err)
				require.Equal(t, format, r.Format())
				require.Equal(t, path, r.Path())
				require.Equal(t, want, r.Size())
				got := make([]byte, len(data))
				_, err = r.ReadAt(got, 3*mib+7)
				require.NoError(t, err)
				require.Equal(t, data, got)
				_, err = r.WriteAt(data, 0)
				require.ErrorIs(t, err, ErrReadOnly)
				require.ErrorIs(t, r.Zero(extent.Range{Len: 512}), ErrReadOnly)
				require.NoError(t, r.Sync())
				_, isVHD := r.Footer()
				require.Equal(t, format == FormatVHD, isVHD)
				require.NoError(t, r.Close())
			}
		})
	}
}

func TestBounds(t *testing.T) {
	d, err := CreateVHD(filepath.Join(t.TempDir(), "a.vhd"), mib)
	require.NoError(t, err)
	defer func() { require.NoError(t, d.Close()) }()
	p := make([]byte, 1024)
	for _, off := range []int64{-1, mib - 1023, mib, mib + 512, 1 << 62} {
		_, err := d.WriteAt(p, off)
		require.ErrorIs(t, err, ErrRange, "at %d", off)
		require.ErrorIs(t, d.Zero(extent.Range{Off: off, Len: 1024}), ErrRange, "at %d", off)
	}
	require.ErrorIs(t, d.Zero(extent.Range{Off: 5, Len: -1}), ErrRange)
	require.NoError(t, d.Zero(extent.Range{Off: mib}))
	p[0] = 1
	n, err := d.ReadAt(p, mib-512) // the footer follows, and must not be seen
	require.Equal(t, 512, n)
	require.ErrorIs(t, err, io.EOF)
	require.True(t, IsZero(p[:n]))
	_, err = d.ReadAt(p, mib)
	require.ErrorIs(t, err, io.EOF)
	_, err = d.ReadAt(p, -1)
	require.ErrorIs(t, err, ErrRange)
	require.Empty(t, collect(t, d, extent.Range{Off: mib, Len: 512}))
	require.NoError(t, os.Truncate(d.Path(), 4096))
	_, err = d.ReadAt(p, 8192)
	require.ErrorIs(t, err, ErrTruncated)
}

func TestCreateRefuses(t *testing.T) {
	dir := t.TempDir()
	for _, tc := range []struct {
		format Format
		size   int64
		want   error
	}{
		{FormatVHD, 0, ErrTooLarge}, {FormatRaw, -512, ErrTooLarge}, {FormatVHD, MaxVHDSize + 512, ErrTooLarge},
		{FormatVHD, 1<<63 - 512, ErrTooLarge}, {FormatRaw, 1000, ErrSectorSize}, {FormatVHD, 1000, ErrSectorSize},
		{FormatAuto, mib, ErrUnsupported}, {"vhdx", mib, ErrUnsupported},
	} {
		_, err := Create(filepath.Join(dir, "x"), tc.format, tc.size)
		require.ErrorIs(t, err, tc.want, "%v", tc)
	}
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
}

// verdicts are the errors about an image; each bad image must give exactly one of them.
var verdicts = []error{ErrNotFound, ErrTruncated, ErrBadFooter, ErrUnsupported, ErrSectorSize, ErrTooLarge, ErrLocked}

func TestOpenRefusesBadImages(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good.vhd")
	d, err := CreateVHD(good, mib)
	require.NoError(t, err)
	require.NoError(t, d.Close())
	image, err := os.ReadFile(good)
	require.NoError(t, err)
	footer := image[mib:]
	sealed := func(change func(p []byte)) []byte { // with a right checksum again
		p := slices.Clone(image)
		change(p[mib:])
		binary.BigEndian.PutUint32(p[mib+footerChecksumAt:], footerChecksum(p[mib:]))
		return p
	}
	dynamic := sealed(func(p []byte) { binary.BigEndian.PutUint32(p[60:], 3) })
	for _, tc := range []struct {
		name   string
		file   string
		format Format
		data   []byte
		want   error
	}{
		{"empty", "a.raw", FormatRaw, []byte{}, ErrTruncated},
		{"empty vhd", "a.vhd", FormatAuto, []byte{}, ErrTruncated},
		{"raw of odd size", "a.img", FormatAuto, make([]byte, 1000), ErrSectorSize},
		{"cut by a sector", "a.vhd", FormatVHD, image[:mib], ErrTruncated},
		{"cut in the footer", "a.vhd", FormatVHD, image[:mib+100], ErrTruncated},
		{"cut to less than a footer", "a.vhd", FormatVHD, image[:100], ErrTruncated},
		{"middle missing", "a.vhd", FormatVHD, append(slices.Clone(image[:4096]), footer...), ErrTruncated},
		{"too long", "a.vhd", FormatVHD, append(make([]byte, 512), image...), ErrBadFooter},
		{"checksum", "a.vhd", FormatVHD, func() []byte { p := slices.Clone(image); p[mib+70] ^= 1; return p }(), ErrBadFooter},
		{"version", "a.vhd", FormatVHD, sealed(func(p []byte) { p[13] = 9 }), ErrBadFooter},
		{"data offset", "a.vhd", FormatVHD, sealed(func(p []byte) { p[16] = 0 }), ErrBadFooter},
		{"size not of sectors", "a.vhd", FormatVHD, sealed(func(p []byte) { p[55] = 1 }), ErrSectorSize},
		{"size zero", "a.vhd", FormatVHD, sealed(func(p []byte) { clear(p[48:56]) }), ErrTooLarge},
		{"size negative", "a.vhd", FormatVHD, sealed(func(p []byte) { p[48] = 0xff }), ErrTooLarge},
		{"dynamic", "a.vhd", FormatVHD, dynamic, ErrUnsupported},
		{"dynamic without its name", "a.img", FormatAuto, dynamic, ErrUnsupported},
		{"differencing", "a.vhd", FormatAuto, sealed(func(p []byte) { p[63] = 4 }), ErrUnsupported},
		{"dynamic, cut", "a.vhd", FormatVHD, append(slices.Clone(dynamic[mib:]), make([]byte, 2048)...), ErrUnsupported},
		{"vhdx", "a.img", FormatAuto, append([]byte("vhdxfile"), make([]byte, 1016)...), ErrUnsupported},
		{"qcow2", "a.img", FormatAuto, append([]byte("QFI\xfb"), make([]byte, 1020)...), ErrUnsupported},
		{"raw by name", "a.vhd", FormatAuto, make([]byte, mib), ErrTruncated},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), tc.file)
			require.NoError(t, os.WriteFile(path, tc.data, 0o600))
			for _, readOnly := range []bool{true, false} {
				_, err := Open(path, tc.format, readOnly)
				for _, v := range verdicts {
					require.Equal(t, errors.Is(v, tc.want), errors.Is(err, v), "%v / %v", err, v)
				}
			}
		})
	}
	_, err = Open(filepath.Join(dir, "none"), FormatAuto, true)
	require.ErrorIs(t, err, ErrNotFound)
	require.ErrorIs(t, err, fs.ErrNotExist)
	_, err = Open(dir, FormatAuto, true)
	require.ErrorIs(t, err, ErrUnsupported)
	_, err = Open(good, "vhdx", true)
	require.ErrorIs(t, err, ErrUnsupported)

	// What decides between raw and VHD if nobody says.
	for name, want := range map[string]Format{"b.raw": FormatRaw, "b.img": FormatVHD, "b": FormatVHD, "b.VHD": FormatVHD} {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, image, 0o600))
		d, err := Open(path, FormatAuto, true)
		require.NoError(t, err)
		require.Equal(t, want, d.Format(), "%s", name)
		require.NoError(t, d.Close())
	}
	footerLike := append(make([]byte, 3*mib), footer...) // a guest wrote a footer, but not the one of this file
	path := filepath.Join(dir, "c.img")
	require.NoError(t, os.WriteFile(path, footerLike, 0o600))
	d, err = Open(path, FormatAuto, true)
	require.NoError(t, err)
	require.Equal(t, FormatRaw, d.Format())
	require.NoError(t, d.Close())
}

func TestOneOwner(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.raw")
	d, err := Create(path, FormatRaw, mib)
	require.NoError(t, err)
	_, err = Open(path, FormatRaw, false)
	require.ErrorIs(t, err, ErrLocked)
	r, err := Open(path, FormatRaw, true) // reading is not owning
	require.NoError(t, err)
	require.NoError(t, d.Close())
	d, err = Open(path, FormatRaw, false)
	require.NoError(t, err)
	require.NoError(t, d.Close())
	require.NoError(t, r.Close())
	require.Error(t, r.Close())
}

func TestExtentsSkipAbsentSpace(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("all of an image counts as data there")
	}
	for _, format := range []Format{FormatRaw, FormatVHD} {
		d, err := Create(filepath.Join(t.TempDir(), "big"), format, 20<<30)
		require.NoError(t, err)
		whole := extent.Range{Len: d.Size()}
		require.Empty(t, collect(t, d, whole), "the footer is not part of the disk")
		data := bytes.Repeat([]byte{1}, 64<<10)
		for _, at := range []int64{1 << 30, 19 << 30} {
			_, err := d.WriteAt(data, at)
			require.NoError(t, err)
		}
		require.Equal(t, []extent.Range{{Off: 1 << 30, Len: 64 << 10}, {Off: 19 << 30, Len: 64 << 10}}, collect(t, d, whole))
		require.Equal(t, []extent.Range{{Off: 1<<30 + 4096, Len: 4096}},
			collect(t, d, extent.Range{Off: 1<<30 + 4096, Len: 4096}))
		require.Empty(t, collect(t, d, extent.Range{Off: 2 << 30, Len: 1 << 30}))

		require.NoError(t, d.Zero(extent.Range{Off: 1 << 30, Len: 32 << 10}))
		require.Equal(t, extent.Range{Off: 1<<30 + 32<<10, Len: 32 << 10}, collect(t, d, whole)[0], "space was given back")

		for range d.Extents(context.Background(), whole) {
			break
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		for _, err := range d.Extents(ctx, whole) {
			require.ErrorIs(t, err, context.Canceled)
		}
		require.NoError(t, d.Close())
	}
}

// TestAgainstByteModel runs writes and zeroes against a byte slice, with and without punching of holes.
func TestAgainstByteModel(t *testing.T) {
	const size = 256 << 10
	dir := t.TempDir()
	n := 0
	rapid.Check(t, func(t *rapid.T) {
		n++
		path := filepath.Join(dir, uuid.NewString())
		format := rapid.SampledFrom([]Format{FormatRaw, FormatVHD}).Draw(t, "format")
		d, err := Create(path, format, size)
		require.NoError(t, err)
		defer func() { require.NoError(t, errors.Join(d.Close(), os.Remove(path))) }()
		d.noPunch.Store(rapid.Bool().Draw(t, "no holes"))
		model := make([]byte, d.Size())
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			off := rapid.Int64Range(0, size).Draw(t, "off")
			r := extent.Range{Off: off, Len: rapid.Int64Range(0, size-off).Draw(t, "len")}
			if rapid.Bool().Draw(t, "zero") {
				require.NoError(t, d.Zero(r))
				clear(model[r.Off:r.End()])
			} else {
				b := rapid.ByteRange(1, 255).Draw(t, "byte")
				p := bytes.Repeat([]byte{b}, int(r.Len))
				_, err := d.WriteAt(p, r.Off)
				require.NoError(t, err)
				copy(model[r.Off:], p)
			}
		}
		got := make([]byte, d.Size())
		_, err = d.ReadAt(got, 0)
		require.NoError(t, err)
		require.True(t, bytes.Equal(model, got))
		var data extent.Set
		last := int64(0)
		for _, have := range collect(t, d, extent.Range{Len: d.Size()}) {
			require.GreaterOrEqual(t, have.Off, last)
			last = have.End()
			data.Add(have)
		}
		for gap := range data.Gaps(extent.Range{Len: d.Size()}) {
			require.True(t, IsZero(model[gap.Off:gap.End()]), "data outside of the extents")
		}
		if _, ok := d.Footer(); ok {
			raw, err := os.ReadFile(path)
			require.NoError(t, err)
			_, err = ParseFooter(raw[d.Size():])
			require.NoError(t, err)
		}
	})
}

func TestFooterLayout(t *testing.T) {
	id := uuid.MustParse("00112233-4455-6677-8899-aabbccddeeff")
	f, err := NewFooter(40*mib, id, time.Date(2026, 10, 2, 12, 0, 0, 5, time.UTC))
	require.NoError(t, err)
	p := f.Bytes()
	require.Equal(t, "conectix", string(p[:8]))
	require.Equal(t, []byte{0, 0, 0, 2, 0, 1, 0, 0}, p[8:16])
	require.Equal(t, bytes.Repeat([]byte{0xff}, 8), p[16:24])
	require.EqualValues(t, 844257600, binary.BigEndian.Uint32(p[24:]))
	require.Equal(t, "win ", string(p[28:32]))
	require.Equal(t, "Wi2k", string(p[36:40]))
	require.EqualValues(t, 40*mib, binary.BigEndian.Uint64(p[40:]))
	require.EqualValues(t, 40*mib, binary.BigEndian.Uint64(p[48:]))
	require.Equal(t, []byte{0x03, 0xc3, 5, 17, 0, 0, 0, 2}, p[56:64]) // 963 cylinders
	require.Equal(t, id[:], p[68:84])
	require.True(t, IsZero(p[84:]))
	back, err := ParseFooter(p[:])
	require.NoError(t, err)
	require.Equal(t, f, back)
	for _, size := range []int64{0, -512, MaxVHDSize + 512} {
		_, err := NewFooter(size, id, time.Now())
		require.ErrorIs(t, err, ErrTooLarge)
	}
	_, err = NewFooter(513, id, time.Now())
	require.ErrorIs(t, err, ErrSectorSize)
	_, err = NewFooter(MaxVHDSize, id, time.Now())
	require.NoError(t, err)
}

func TestGeometry(t *testing.T) {
	require.Equal(t, Geometry{65535, 16, 255}, GeometryOf(MaxVHDSize))
	require.Equal(t, Geometry{65535, 16, 255}, GeometryOf(128<<30))
	rapid.Check(t, func(t *rapid.T) {
		sectors := rapid.Int64Range(1, 65535*16*255).Draw(t, "sectors")
		g := GeometryOf(sectors * SectorSize)
		require.LessOrEqual(t, int64(g.Cylinders)*int64(g.Heads)*int64(g.Sectors), sectors)
		require.LessOrEqual(t, g.Heads, uint8(16))
		require.Positive(t, g.Heads)
	})
}

func TestPad(t *testing.T) {
	for size, want := range map[int64]int64{mib: mib, mib + 1: 2 * mib, 512: mib, 3 * mib: 3 * mib} {
		got, padding := Pad(size)
		require.Equal(t, want, got)
		require.Equal(t, want-size, padding)
	}
}

func TestIsZero(t *testing.T) {
	require.True(t, IsZero(nil))
	p := make([]byte, 10000)
	for _, n := range []int{1, 7, 8, 9, 4095, 4096, 4097, 8192, 10000} {
		require.True(t, IsZero(p[:n]))
		for _, at := range []int{0, 1, n / 2, n - 1} {
			p[at%n] = 1
			require.False(t, IsZero(p[:n]), "%d of %d", at, n)
			p[at%n] = 0
		}
	}
}

func FuzzParseFooter(f *testing.F) {
	good, _ := NewFooter(mib, uuid.UUID{1}, time.Unix(1e9, 0))
	p := good.Bytes()
	f.Add(p[:])
	f.Add(p[:100])
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) >= FooterSize {
			binary.BigEndian.PutUint32(p[footerChecksumAt:], footerChecksum(p[:FooterSize]))
		}
		footer, err := ParseFooter(p)
		if err != nil || footer.Type != TypeFixed {
			return
		}
		raw := footer.Bytes()
		back, err := ParseFooter(raw[:])
		require.NoError(t, err)
		require.Equal(t, footer, back)
	})
}

func BenchmarkIsZero(b *testing.B) {
	for _, size := range []int{4 << 10, 64 << 10, 1 << 20} {
		p := make([]byte, size)
		b.Run(map[int]string{4 << 10: "4KiB", 64 << 10: "64KiB", 1 << 20: "1MiB"}[size], func(b *testing.B) {
			b.SetBytes(int64(size))
			for b.Loop() {
				if !IsZero(p) {
					b.Fatal()
				}
			}
		})
	}
	p := make([]byte, 64<<10)
	for i := range p {
		p[i] = byte(rand.Uint32())
	}
	b.Run("random", func(b *testing.B) {
		for b.Loop() {
			if IsZero(p) {
				b.Fatal()
			}
		}
	})
}
