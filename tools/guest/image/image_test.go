package image

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestValidate(t *testing.T) {
	o := Default()
	require.ErrorContains(t, o.Validate(), "output folder")
	o.Out = "/x"
	require.NoError(t, o.Validate())
	o.OSBytes, o.DataBytes = 10*mib, 64*mib+1
	err := o.Validate()
	require.ErrorContains(t, err, "OS disk")
	require.ErrorContains(t, err, "data disk")
}

func TestDefaultCacheObeysEnvironment(t *testing.T) {
	t.Setenv(CacheEnv, "/elsewhere")
	require.Equal(t, "/elsewhere", Default().Cache)
}

// memory is a disk.
type memory []byte

func (m memory) WriteAt(b []byte, off int64) (int, error) { return copy(m[off:], b), nil }

func TestPartitionTable(t *testing.T) {
	const size = 64 * mib
	disk := make(memory, size)
	parts := layout(size)
	require.NoError(t, writeGPT(disk, size, parts))
	require.Equal(t, []byte{0x55, 0xaa}, []byte(disk[510:512]))

	check := func(at int64) (header, table []byte) {
		header = bytes.Clone(disk[at*sector : (at+1)*sector])
		require.Equal(t, "EFI PART", string(header[:8]))
		sum := binary.LittleEndian.Uint32(header[16:])
		clear(header[16:20])
		require.Equal(t, crc32.ChecksumIEEE(header[:92]), sum)
		tableAt := int64(binary.LittleEndian.Uint64(header[72:])) * sector
		table = disk[tableAt:][:gptTable*sector]
		require.Equal(t, crc32.ChecksumIEEE(table), binary.LittleEndian.Uint32(header[88:]))
		require.EqualValues(t, at, binary.LittleEndian.Uint64(header[24:]))
		return header, table
	}
	first, table := check(1)
	second, copied := check(size/sector - 1)
	require.Equal(t, table, copied)
	require.Equal(t, first[40:72], second[40:72])

	end := int64(gptFirst)
	for i, p := range parts {
		e := table[i*gptEntrySize:]
		from, to := int64(binary.LittleEndian.Uint64(e[32:])), int64(binary.LittleEndian.Uint64(e[40:]))
		require.Equal(t, p.kind[:], e[:16])
		require.GreaterOrEqual(t, from, end)
		require.Equal(t, p.len, (to-from+1)*sector)
		end = to + 1
	}
	require.LessOrEqual(t, end, int64(size/sector-1-gptTable))

	// GRUB leaves the table alone.
	require.NoError(t, writeGRUB(disk, bytes.Repeat([]byte{7}, 512), bytes.Repeat([]byte{9}, 4096), parts[0]))
	check(1)
	require.Equal(t, []byte{0x55, 0xaa}, []byte(disk[510:512]))
	require.EqualValues(t, biosBootAt/sector, binary.LittleEndian.Uint64(disk[bootImgKernelSector:]))
	require.Error(t, writeGRUB(disk, make([]byte, 512), make([]byte, 2*mib), parts[0]))
}

func TestCopySparseKeepsContent(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	content := make([]byte, 200<<10+3)
	content[0], content[100<<10], content[len(content)-1] = 1, 2, 3
	require.NoError(t, os.WriteFile(file, content, 0o600))
	disk := make(memory, 1*mib)
	require.NoError(t, copySparse(disk, 4096, file))
	require.Equal(t, content, []byte(disk[4096:4096+len(content)]))
}

func TestArchive(t *testing.T) {
	var c cpio
	c.dir("dev")
	c.console()
	c.file("init", 0o755, []byte("hello"))
	c.end()
	b := c.out.Bytes()
	require.Zero(t, len(b)%4)
	var names []string
	for at := 0; ; {
		require.Equal(t, "070701", string(b[at:at+6]))
		word := func(i int) int {
			var n int
			for _, d := range b[at+6+8*i : at+14+8*i] {
				n = n<<4 | strings.IndexByte("0123456789abcdef", d)
			}
			return n
		}
		size, nameLen := word(6), word(11)
		name := string(b[at+110 : at+110+nameLen-1])
		names = append(names, name)
		data := (at + 110 + nameLen + 3) &^ 3
		switch name {
		case "init":
			require.Equal(t, "hello", string(b[data:data+size]))
			require.Equal(t, modeFile|0o755, word(1))
		case "dev/console":
			require.Equal(t, modeChar|0o600, word(1))
			require.Equal(t, []int{5, 1}, []int{word(9), word(10)})
		}
		at = (data + size + 3) &^ 3
		if name == "TRAILER!!!" {
			require.Equal(t, len(b), at)
			break
		}
	}
	require.Equal(t, []string{"dev", "dev/console", "init", "TRAILER!!!"}, names)
}

func TestPackageOfAlternatives(t *testing.T) {
	shown := map[string]map[string]string{
		"b": {"Package": "b", "Version": "1:2", "Filename": "pool/b_2_amd64.deb", "SHA256": "aa"},
	}
	p, err := toPackage(shown, "a", "b")
	require.NoError(t, err)
	require.Equal(t, pkg{Name: "b", Version: "1:2", Filename: "b_2_amd64.deb", SHA256: "aa"}, p)
	_, err = toPackage(shown, "a", "c")
	require.ErrorContains(t, err, "a or c")
}

// A machine without apt's lists uses the packages of the last build; one that never built says what to do.
func TestResolveWithoutLists(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir) // no apt there
	if _, err := lookup("apt-cache"); err == nil {
		t.Skip("apt is found in spite of an empty path")
	}
	_, err := resolve(t.Context(), dir)
	require.ErrorIs(t, err, ErrMissing)
	require.ErrorContains(t, err, "apt-get update")
	set := packageSet{Kernel: pkg{Name: "linux", Version: "6"}, Agent: []pkg{{Name: "agent"}}}
	require.NoError(t, remember(dir, set))
	got, err := resolve(t.Context(), dir)
	require.NoError(t, err)
	require.Equal(t, set, got)
}

func TestMissingNamesThePackage(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	require.ErrorContains(t, Missing(true), "Debian package mtools")
	_, err := command(t.Context(), "", nil, "mformat")
	require.ErrorIs(t, err, ErrMissing)
}
