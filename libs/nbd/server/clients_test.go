package server

import (
	"bytes"
	"encoding/json"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/nbd/internal/wire"
	"github.com/landfall-dr/landfall/libs/testkit"
)

// tool returns the path of a client program. Where it is absent the test is skipped, except in CI.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed, and CI must have it", name)
		}
		t.Skipf("%s is not installed", name)
	}
	return path
}

// run runs a client to its end and returns what it printed.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(testkit.Context(t), tool(t, name), args...)
	cmd.Dir = t.TempDir() // fio leaves files behind
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	require.NoError(t, cmd.Run(), "%s %q:\n%s%s", name, args, out.String(), errs.String())
	return out.String()
}

func (h *harness) uris(export string) map[string]string {
	return map[string]string{
		"tcp":  (&url.URL{Scheme: "nbd", Host: h.tcp, Path: "/" + export}).String(),
		"unix": (&url.URL{Scheme: "nbd+unix", Path: "/" + export, RawQuery: "socket=" + url.QueryEscape(h.unix)}).String(),
	}
}

// eachNetwork runs test over TCP and over a Unix socket, each with a filled disk of its own.
func eachNetwork(t *testing.T, test func(t *testing.T, d *sparseDisk, uri string)) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			d := newSparseDisk(12 * mib)
			d.fill(t, 1)
			h := serveDisks(t, diskSet{"vm/os": d, "vm/data": newSparseDisk(mib)})
			test(t, d, h.uris("vm/os")[network])
		})
	}
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return b
}

// sameBytes compares without printing megabytes.
func sameBytes(t *testing.T, want, got []byte) {
	t.Helper()
	require.Len(t, got, len(want))
	if bytes.Equal(want, got) {
		return
	}
	for i := range want {
		if want[i] != got[i] {
			t.Fatalf("first difference at byte %d: %#x, want %#x", i, got[i], want[i])
		}
	}
}

func TestNbdinfo(t *testing.T) {
	eachNetwork(t, func(t *testing.T, d *sparseDisk, uri string) {
		var info struct {
			Exports []struct {
				Name      string   `json:"export-name"`
				Size      int64    `json:"export-size"`
				Contexts  []string `json:"contexts"`
				Flush     bool     `json:"can_flush"`
				FUA       bool     `json:"can_fua"`
				MultiConn bool     `json:"can_multi_conn"`
				Trim      bool     `json:"can_trim"`
				Zero      bool     `json:"can_zero"`
				FastZero  bool     `json:"can_fast_zero"`
				DF        bool     `json:"can_df"`
				ReadOnly  bool     `json:"is_read_only"`
				Min       int      `json:"block_size_minimum"`
				Preferred int      `json:"block_size_preferred"`
				Max       int      `json:"block_size_maximum"`
			} `json:"exports"`
		}
		require.NoError(t, json.Unmarshal([]byte(run(t, "nbdinfo", "--json", uri)), &info))
		require.Len(t, info.Exports, 1)
		e := info.Exports[0]
		require.Equal(t, "vm/os", e.Name)
		require.Equal(t, d.Size(), e.Size)
		require.Equal(t, []string{wire.ContextAllocation}, e.Contexts)
		require.True(t, e.Flush && e.FUA && e.MultiConn && e.Trim && e.Zero && e.FastZero && e.DF && !e.ReadOnly, "%+v", e)
		require.Equal(t, []int{SectorSize, 4096, MaxRequest}, []int{e.Min, e.Preferred, e.Max})

		list := run(t, "nbdinfo", "--list", uri)
		require.Contains(t, list, `export="vm/os"`)
		require.Contains(t, list, `export="vm/data"`)

		var extents []struct {
			Offset, Length int64
			Type           int
		}
		require.NoError(t, json.Unmarshal([]byte(run(t, "nbdinfo", "--map", "--json", uri)), &extents))
		var data, end int64
		for _, e := range extents {
			require.Equal(t, end, e.Offset)
			end += e.Length
			if e.Type == 0 {
				data += e.Length
			}
		}
		require.Equal(t, d.Size(), end)
		require.Equal(t, d.heldBytes(), data)
	})
}

func TestNbdcopy(t *testing.T) {
	eachNetwork(t, func(t *testing.T, d *sparseDisk, uri string) {
		dir := t.TempDir()
		want, _ := d.content()
		out := filepath.Join(dir, "out")
		run(t, "nbdcopy", "--connections=4", "--threads=4", uri, out)
		sameBytes(t, want, readFile(t, out))
		require.Zero(t, d.readAbsent(), "holes are not read")

		other := newSparseDisk(d.Size())
		other.fill(t, 2)
		in := filepath.Join(dir, "in")
		want, _ = other.content()
		clear(want[:mib]) // zeros over what is data now
		require.NoError(t, os.WriteFile(in, want, 0o600))
		run(t, "nbdcopy", "--connections=4", "--threads=4", "--flush", in, uri)
		got, safe := d.content()
		sameBytes(t, want, got)
		sameBytes(t, want, safe)
	})
}

func TestQemuImg(t *testing.T) {
	eachNetwork(t, func(t *testing.T, d *sparseDisk, uri string) {
		dir := t.TempDir()
		var info struct {
			Size int64 `json:"virtual-size"`
		}
		require.NoError(t, json.Unmarshal([]byte(run(t, "qemu-img", "info", "--output=json", uri)), &info))
		require.Equal(t, d.Size(), info.Size)

		var extents []struct {
			Start, Length int64
			Data          bool
		}
		require.NoError(t, json.Unmarshal([]byte(run(t, "qemu-img", "map", "--output=json", "-f", "raw", uri)), &extents))
		var data int64
		for _, e := range extents {
			if e.Data {
				data += e.Length
			}
		}
		require.Equal(t, d.heldBytes(), data)

		out := filepath.Join(dir, "out")
		want, _ := d.content()
		run(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri, out)
		sameBytes(t, want, readFile(t, out))
		run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri, out)

		other := newSparseDisk(d.Size())
		other.fill(t, 3)
		want, _ = other.content()
		in := filepath.Join(dir, "in")
		require.NoError(t, os.WriteFile(in, want, 0o600))
		cmd := exec.CommandContext(testkit.Context(t), tool(t, "qemu-img"), "compare", "-f", "raw", "-F", "raw", uri, in)
		require.Error(t, cmd.Run(), "they differ")
		run(t, "qemu-img", "convert", "-n", "-W", "-f", "raw", "-O", "raw", in, uri)
		run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri, in)
		got, safe := d.content()
		sameBytes(t, want, got)
		sameBytes(t, want, safe)
		require.Zero(t, d.readAbsent(), "holes are not read")
	})
}

func TestQemuIO(t *testing.T) {
	eachNetwork(t, func(t *testing.T, d *sparseDisk, uri string) {
		before := d.heldBytes()
		out := run(t, "qemu-io", "-f", "raw", "-d", "unmap", uri,
			"-c", "write -P 0x11 0 4M",
			"-c", "write -f -P 0x22 1M 64k",
			"-c", "write -z 2M 64k",
			"-c", "write -z -u 3M 64k",
			"-c", "discard 3584k 64k",
			"-c", "aio_write -P 0x33 8M 1M", "-c", "aio_write -P 0x44 9M 1M", "-c", "aio_flush",
			"-c", "read -P 0x11 0 1M", "-c", "read -P 0x22 1M 64k", "-c", "read -P 0 2M 64k", "-c", "read -P 0 3M 64k",
			"-c", "read -P 0 3584k 64k", "-c", "read -P 0x33 8M 1M", "-c", "read -P 0x44 9M 1M", "-c", "flush")
		require.NotContains(t, out, "failed", out)
		got, safe := d.content()
		sameBytes(t, got, safe)
		sameBytes(t, bytes.Repeat([]byte{0x22}, 64<<10), got[mib:mib+64<<10])
		sameBytes(t, make([]byte, 64<<10), got[3*mib:3*mib+64<<10])
		require.NotEqual(t, before, d.heldBytes())
	})
}

// fio checks by itself that what it wrote is what it reads, over several connections at once.
func TestFio(t *testing.T) {
	if !strings.Contains(run(t, "fio", "--enghelp"), "\tnbd") {
		t.Log("this fio is built without its nbd engine: not tested with it")
		return
	}
	eachNetwork(t, func(t *testing.T, d *sparseDisk, uri string) {
		out := run(t, "fio", "--name=verify", "--ioengine=nbd", "--uri="+uri, "--rw=randrw", "--bsrange=4k-128k", "--blockalign=4k",
			"--iodepth=32", "--numjobs=3", "--offset_increment=4m", "--size=4m", "--verify=crc32c", "--verify_fatal=1",
			"--do_verify=1", "--end_fsync=1", "--randseed=7", "--thread", "--output-format=terse")
		t.Log(strings.TrimSpace(out)[:min(200, len(strings.TrimSpace(out)))])
	})
}
