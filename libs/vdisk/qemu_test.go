package vdisk

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/extent"
)

// qemuImg returns a function that runs qemu-img in dir and returns its output. Without qemu-img the test is skipped,
// except in CI, which must have it.
func qemuImg(t *testing.T, dir string) func(args ...string) []byte {
	t.Helper()
	path, err := exec.LookPath("qemu-img")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("qemu-img is not installed")
		}
		t.Skip("qemu-img is not installed")
	}
	return func(args ...string) []byte {
		t.Helper()
		cmd := exec.Command(path, args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "qemu-img %v: %s", args, out)
		return out
	}
}

// scribble writes some ranges of noise, the ends of the disk among them, and returns the whole content.
func scribble(t *testing.T, d *Image) []byte {
	t.Helper()
	content := make([]byte, d.Size())
	for i, off := range []int64{0, 3<<20 + 512, d.Size()/2 + 4096, d.Size() - 8192} {
		p := content[off : off+8192]
		rng := rand.NewChaCha8([32]byte{byte(i)})
		_, _ = rng.Read(p)
		_, err := d.WriteAt(p, off)
		require.NoError(t, err)
	}
	return content
}

func virtualSize(t *testing.T, info []byte) int64 {
	t.Helper()
	var out struct {
		Size int64 `json:"virtual-size"`
	}
	require.NoError(t, json.Unmarshal(info, &out))
	return out.Size
}

// TestQEMUReadsOurs covers sizes whose geometry is below, and far below, the exact size.
func TestQEMUReadsOurs(t *testing.T) {
	for _, size := range []int64{16 << 20, 65<<20 + 512, 513 << 20, 1 << 30, 40 << 30, 200 << 30, MaxVHDSize} {
		dir := t.TempDir()
		run := qemuImg(t, dir)
		d, err := CreateVHD(filepath.Join(dir, "ours.vhd"), size)
		require.NoError(t, err)
		want, _ := Pad(size)
		if size <= 66<<20 {
			content := scribble(t, d)
			require.NoError(t, os.WriteFile(filepath.Join(dir, "want.raw"), content, 0o600))
		}
		require.NoError(t, d.Close())
		require.Equal(t, want, virtualSize(t, run("info", "-f", "vpc", "--output=json", "ours.vhd")))
		if size <= 66<<20 {
			run("compare", "-f", "vpc", "-F", "raw", "ours.vhd", "want.raw")
			run("convert", "-f", "vpc", "-O", "raw", "ours.vhd", "back.raw")
			run("compare", "-f", "raw", "-F", "raw", "back.raw", "want.raw")
		}
	}
}

func TestWeReadQEMUs(t *testing.T) {
	dir := t.TempDir()
	run := qemuImg(t, dir)
	raw, err := Create(filepath.Join(dir, "want.raw"), FormatRaw, 37<<20)
	require.NoError(t, err)
	content := scribble(t, raw)
	require.NoError(t, raw.Close())

	run("convert", "-f", "raw", "-O", "vpc", "-o", "subformat=fixed,force_size=on", "want.raw", "fixed.vhd")
	d, err := Open(filepath.Join(dir, "fixed.vhd"), FormatAuto, false)
	require.NoError(t, err)
	require.EqualValues(t, 37<<20, d.Size())
	got := make([]byte, d.Size())
	for have, err := range d.Extents(t.Context(), extent.Range{Len: d.Size()}) {
		require.NoError(t, err)
		_, err = d.ReadAt(got[have.Off:have.End()], have.Off)
		require.NoError(t, err)
	}
	require.True(t, bytes.Equal(content, got))
	require.NoError(t, d.Zero(extent.Range{Off: 0, Len: 8192}))
	require.NoError(t, d.Close())
	clear(content[:8192])
	require.NoError(t, os.WriteFile(filepath.Join(dir, "want2.raw"), content, 0o600))
	run("compare", "-f", "vpc", "-F", "raw", "fixed.vhd", "want2.raw")

	for name, options := range map[string]string{"d1.vhd": "subformat=dynamic", "d2.vhd": "subformat=dynamic,force_size=on"} {
		run("convert", "-f", "raw", "-O", "vpc", "-o", options, "want.raw", name)
		_, err = Open(filepath.Join(dir, name), FormatAuto, true)
		require.ErrorIs(t, err, ErrUnsupported)
	}
	for _, format := range []string{"vhdx", "qcow2"} {
		run("convert", "-f", "raw", "-O", format, "want.raw", "other.img")
		_, err = Open(filepath.Join(dir, "other.img"), FormatAuto, true)
		require.ErrorIs(t, err, ErrUnsupported)
	}
}

// TestGeometryAsQEMU compares with an implementation that is not ours: without force_size QEMU makes the size a
// product of the geometry it computes.
func TestGeometryAsQEMU(t *testing.T) {
	dir := t.TempDir()
	run := qemuImg(t, dir)
	for _, size := range []string{"3M", "40M", "127M", "512M", "513M", "1G", "31G", "60G"} {
		run("create", "-q", "-f", "vpc", "-o", "subformat=fixed", "g.vhd", size)
		d, err := Open(filepath.Join(dir, "g.vhd"), FormatAuto, true)
		require.NoError(t, err)
		footer, _ := d.Footer()
		require.Equal(t, footer.Geometry, GeometryOf(d.Size()), "%s", size)
		require.NoError(t, d.Close())
	}
}
