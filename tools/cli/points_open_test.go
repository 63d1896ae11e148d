package cli_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/blobstore/dir"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	nbdclient "github.com/landfall-dr/landfall/libs/nbd"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/rpc"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
	"github.com/landfall-dr/landfall/libs/segment"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/vdisk"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	failoverorchestrator "github.com/landfall-dr/landfall/services/failover-orchestrator"
	"github.com/landfall-dr/landfall/tools/cli"
)

const (
	pointLineage = replica.Lineage("00112233445566778899aabbccddeeff")
	pointVM      = "sites/local/vms/6f1c2d3e-0000-4000-8000-000000000001"
)

// tool returns a program that is installed here. Where it is absent the test is skipped, except in CI.
func tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		path, err = exec.LookPath("/usr/sbin/" + name)
	}
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed, and CI must have it", name)
		}
		t.Skipf("%s is not installed", name)
	}
	return path
}

func sh(t testing.TB, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), tool(t, name), args...)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s %q:\n%s", name, args, out)
	return string(out)
}

// chain is a lineage in a folder.
type chain struct {
	t    testing.TB
	dir  string
	r    *replica.Replica
	now  map[string][]byte
	last replica.Ordinal
	at   map[replica.Ordinal]map[string][]byte
}

func newChain(t testing.TB, disks map[string][]byte) *chain {
	t.Helper()
	c := &chain{t: t, dir: filepath.Join(t.TempDir(), "store"), now: disks, at: map[replica.Ordinal]map[string][]byte{}}
	store, err := dir.Open(c.dir, dir.Options{})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	c.r, err = replica.Create(t.Context(), store, pointLineage)
	require.NoError(t, err)
	config, err := c.r.PutConfig(t.Context(), fmt.Appendf(nil, `{"v":1,"name":%q,"id":%q,"display_name":"web"}`, pointVM, filepath.Base(pointVM)))
	require.NoError(t, err)
	c.commit(replica.KindPartial, config, func(string) [][2]int64 { return nil })
	c.commit(replica.KindBase, config, nil)
	return c
}

// commit ships what changed, everything that is not zero when changed is nil or says so.
func (c *chain) commit(kind replica.Kind, config string, changed func(disk string) [][2]int64) {
	c.t.Helper()
	base := c.last
	if kind != replica.KindBase {
		c.last++
	}
	p := replica.Proposal{Kind: kind, Epoch: 1, Base: base}
	h := segment.Header{Lineage: pointLineage.Bytes(), Gen: 1, Kind: segment.KindPoint, Ordinal: uint64(c.last)}
	switch kind {
	case replica.KindPartial:
		p.Pass, h.Kind, h.Task, p.Base = &replica.Pass{Ordinal: c.last, I: 1, K: 1}, segment.KindPass, 1, 0
	default:
		if kind == replica.KindBase {
			c.last++
			p.Base, h.Ordinal = c.last-1, uint64(c.last)
		}
		p.Point, p.Config, p.Consistency, p.CutTime = c.last, config, replica.ConsistencyCrash, time.Date(2026, 11, 23, 5, 0, int(c.last), 0, time.UTC)
	}
	tx := replica.NewTx()
	for _, id := range slices.Sorted(func(yield func(string) bool) {
		for id := range c.now {
			if !yield(id) {
				return
			}
		}
	}) {
		b := c.now[id]
		h.DiskID, h.DiskSize = id, int64(len(b))
		d := replica.Disk{ID: id, Gen: 1, Size: int64(len(b))}
		put := func(w *segment.Writer) {
			if w.Empty() {
				return
			}
			body, sha, _, err := w.Finish()
			require.NoError(c.t, err)
			s, err := c.r.PutSegment(c.t.Context(), replica.SegmentKey{Kind: kind, Ordinal: c.last, Tx: tx, DiskID: id, K: len(d.Segments)}, body, sha)
			require.NoError(c.t, err)
			d.Segments = append(d.Segments, s)
		}
		var ranges [][2]int64
		if kind == replica.KindPartial {
			ranges = [][2]int64{{0, int64(len(b))}}
		} else if changed != nil {
			ranges = changed(id)
		}
		w, err := segment.NewWriter(h, nil, segment.Options{})
		require.NoError(c.t, err)
		const piece = 256 << 10
		for _, r := range ranges {
			for off := r[0]; off < r[1]; off += piece {
				q := b[off:min(off+piece, r[1])]
				if !vdisk.IsZero(q) || kind != replica.KindPartial {
					require.NoError(c.t, w.Data(off, q))
				}
				if off%(16<<20) == 16<<20-piece {
					put(w)
					w, err = segment.NewWriter(h, nil, segment.Options{})
					require.NoError(c.t, err)
				}
			}
		}
		put(w)
		p.Disks = append(p.Disks, d)
	}
	_, err := c.r.Commit(c.t.Context(), p)
	require.NoError(c.t, err)
	if kind != replica.KindPartial {
		held := map[string][]byte{}
		for id, b := range c.now {
			held[id] = bytes.Clone(b)
		}
		c.at[c.last] = held
	}
}

// site serves the orchestrator's API over the chain, on a port and with certificates as `landfall up` does.
type site struct {
	t       testing.TB
	state   string
	bus     *bus.Bus
	store   *blobstoretest.Faulty
	address string
	ca      *pki.Authority
	stop    func()
}

func newSite(t testing.TB, c *chain) *site {
	t.Helper()
	ctx := t.Context()
	inner, err := dir.Open(c.dir, dir.Options{})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, inner.Close()) })
	s := &site{t: t, state: t.TempDir(), store: blobstoretest.NewFaulty(inner, nil), address: "127.0.0.1:0"}
	server, err := bus.StartEmbedded(ctx, bus.ServerOptions{StoreDir: t.TempDir(), Unsynced: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Stop(context.Background())) })
	s.bus, err = bus.Connect(ctx, bus.Options{Server: server, Name: "failover-orchestrator", Logger: testkit.Logger(t)})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.bus.Close(context.Background())) })
	require.NoError(t, s.bus.Declare(ctx, bus.Declaration{}))
	vms, err := bus.OpenKV[*schedulerv1.ProtectedVm](ctx, s.bus, bus.BucketVMs)
	require.NoError(t, err)
	_, err = vms.Create(ctx, bus.Key("local", filepath.Base(pointVM)), &schedulerv1.ProtectedVm{
		Name: pointVM, DisplayName: "web", Lineage: string(pointLineage), State: typesv1.ProtectionState_PROTECTION_STATE_PROTECTED,
	})
	require.NoError(t, err)
	s.ca, err = pki.Open(filepath.Join(s.state, "pki"), time.Now)
	require.NoError(t, err)
	_, err = s.ca.Ensure(filepath.Join(s.state, "client"), pki.Request{Identity: pki.UserIdentity("cli", pki.RoleOperator)})
	require.NoError(t, err)
	_, err = s.ca.Ensure(filepath.Join(s.state, "orchestrator"), pki.Request{Identity: pki.ServiceIdentity("failover-orchestrator")})
	require.NoError(t, err)
	s.start()
	t.Cleanup(func() { s.stop() })
	require.NoError(t, cli.WriteClientConfig(s.state, cli.ClientConfig{
		Site: "local", Certificates: "client", Endpoints: map[string]string{"failover-orchestrator": s.address},
	}))
	return s
}

// start runs an orchestrator that remembers nothing, at the address of the one before.
func (s *site) start() {
	s.t.Helper()
	id, err := rpc.LoadIdentity(filepath.Join(s.state, "orchestrator"), time.Now)
	require.NoError(s.t, err)
	c := failoverorchestrator.Default()
	o, err := failoverorchestrator.New(s.t.Context(), c, failoverorchestrator.Deps{
		Logger: testkit.Logger(s.t), Bus: s.bus, Store: s.store, Holder: uuid.NewString(), Scheduler: noScheduler{},
	})
	require.NoError(s.t, err)
	srv, err := rpc.NewServer(rpc.ServerOptions{Name: "failover-orchestrator", Identity: id, StopTimeout: time.Second})
	require.NoError(s.t, err)
	o.Register(srv)
	ctx, cancel := context.WithCancel(context.Background())
	lis, err := net.Listen("tcp", s.address)
	require.NoError(s.t, err)
	s.address = lis.Addr().String()
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx, lis) }()
	s.stop = sync.OnceFunc(func() { cancel(); <-done })
}

type noScheduler struct {
	schedulerv1.ProtectionServiceClient
}

func (noScheduler) GetProtectedVm(context.Context, *schedulerv1.GetProtectedVmRequest, ...grpc.CallOption) (*schedulerv1.GetProtectedVmResponse, error) {
	return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_NOT_PROTECTED, "it is not protected")
}

// opened is a running `landfall points open`.
type opened struct {
	VM      string
	Session string
	Point   uint64
	Pinned  bool
	Disks   []struct {
		ID   string
		Size int64 `json:"size_bytes"`
		URI  string
	}
	uris map[string]string
	errs *testkitBuffer
	stop func() (code int, errOut string)
}

func openPoint(t testing.TB, args ...string) *opened {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	pr, pw := io.Pipe()
	var errOut testkitBuffer
	done := make(chan int, 1)
	go func() {
		done <- cli.Main(ctx, append([]string{"points", "open", "web", "-o", "json"}, args...), strings.NewReader(""), pw, &errOut)
		_ = pw.Close()
	}()
	o := &opened{uris: map[string]string{}, errs: &errOut}
	o.stop = sync.OnceValues(func() (int, string) {
		cancel()
		code := <-done
		return code, errOut.String()
	})
	t.Cleanup(func() { o.stop() })
	out := bufio.NewReader(pr)
	require.NoError(t, json.NewDecoder(out).Decode(o), "%v", errorText{&errOut})
	go func() { _, _ = io.Copy(io.Discard, pr) }()
	for _, d := range o.Disks {
		o.uris[d.ID] = d.URI
	}
	return o
}

type errorText struct{ b *testkitBuffer }

func (e errorText) String() string { return e.b.String() }

// testkitBuffer is a buffer for several goroutines.
type testkitBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *testkitBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *testkitBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// ext4 makes a file system with a known file in it.
func ext4(t testing.TB, size int64, text []byte) []byte {
	t.Helper()
	root := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(root, "in/etc"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(root, "in/etc/known"), text, 0o600))
	image := filepath.Join(root, "image")
	sh(t, "mke2fs", "-q", "-t", "ext4", "-d", filepath.Join(root, "in"), image, fmt.Sprintf("%dK", size>>10))
	b, err := os.ReadFile(image)
	require.NoError(t, err)
	require.Len(t, b, int(size))
	return b
}

func fat(t testing.TB, size int64, text []byte) []byte {
	t.Helper()
	root := t.TempDir()
	known, image := filepath.Join(root, "known"), filepath.Join(root, "image")
	require.NoError(t, os.WriteFile(known, text, 0o600))
	require.NoError(t, os.WriteFile(image, make([]byte, size), 0o600))
	sh(t, "mformat", "-i", image, "-T", fmt.Sprint(size/512), "-h", "16", "-s", "63", "::")
	sh(t, "mcopy", "-i", image, known, "::KNOWN.TXT")
	b, err := os.ReadFile(image)
	require.NoError(t, err)
	return b
}

func random(n int, seed uint64) []byte {
	b := make([]byte, n)
	testkit.Fill(b, seed)
	return b
}

// files has a machine with an ext4 and a FAT disk. Point 3 has other files than points 2 and 4.
func files(t testing.TB) (c *chain, before, after []byte) {
	t.Helper()
	before, after = random(3<<20, 1), random(2<<20+12345, 2)
	const size = 24 << 20
	c = newChain(t, map[string][]byte{"data": ext4(t, size, before), "boot": fat(t, size, before)})
	all := func(string) [][2]int64 { return [][2]int64{{0, size}} }
	c.now = map[string][]byte{"data": ext4(t, size, after), "boot": fat(t, size, after)}
	c.commit(replica.KindPoint, "", all)
	c.now = map[string][]byte{"data": make([]byte, size), "boot": make([]byte, size)}
	c.commit(replica.KindPoint, "", all)
	return c, before, after
}

// requireFiles copies the known file out of both disks, as an operator does, and compares every byte of the disks.
func requireFiles(t *testing.T, c *chain, o *opened, want []byte) {
	t.Helper()
	root := t.TempDir()
	for id, uri := range o.uris {
		raw, again := filepath.Join(root, id+".raw"), filepath.Join(root, id+"-again.raw")
		sh(t, "nbdcopy", "--connections=4", uri, raw)
		sh(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri, again)
		for _, file := range []string{raw, again} {
			got, err := os.ReadFile(file)
			require.NoError(t, err)
			require.True(t, bytes.Equal(c.at[replica.Ordinal(o.Point)][id], got), "disk %s", id)
		}
		file := filepath.Join(root, id+"-known")
		if id == "data" {
			sh(t, "debugfs", "-R", "dump /etc/known "+file, raw)
		} else {
			sh(t, "mcopy", "-n", "-i", raw, "::KNOWN.TXT", file)
		}
		got, err := os.ReadFile(file)
		require.NoError(t, err)
		require.True(t, bytes.Equal(want, got), "the file in disk %s", id)
	}
}

func TestOpenPoint(t *testing.T) {
	c, before, after := files(t)
	s := newSite(t, c)
	t.Setenv("LANDFALL_STATE", s.state)
	o := openPoint(t, "--point", "3")
	require.EqualValues(t, 3, o.Point)
	require.True(t, o.Pinned)
	pins, err := replica.ReadPins(t.Context(), s.store, pointLineage)
	require.NoError(t, err)
	require.Len(t, pins, 1)
	require.Equal(t, "restore/"+o.Session, pins[0].Owner)

	// Two points at once, one of them on a socket.
	socket := filepath.Join(shortDir(t), "s")
	old := openPoint(t, "--point", "2", "--listen", "unix:"+socket)
	info, err := os.Stat(socket)
	require.NoError(t, err)
	require.EqualValues(t, 0o600, info.Mode().Perm())
	requireFiles(t, c, o, after)
	requireFiles(t, c, old, before)
	list := sh(t, "nbdinfo", "--list", strings.TrimSuffix(o.uris["data"], "data"))
	require.Contains(t, list, `export="data"`)
	require.Contains(t, list, `export="boot"`)

	only := openPoint(t, "--point", "3", "--disk", "boot")
	require.Len(t, only.Disks, 1)
	u, err := url.Parse(only.uris["boot"])
	require.NoError(t, err)
	_, err = nbdclient.Dial(t.Context(), "nbd://"+u.Host+"/data")
	require.ErrorIs(t, err, nbdclient.ErrNoExport)

	for _, x := range []*opened{o, old, only} {
		code, errOut := x.stop()
		require.Zero(t, code)
		require.Empty(t, errOut)
	}
	require.NoFileExists(t, socket)
	pins, err = replica.ReadPins(t.Context(), s.store, pointLineage)
	require.NoError(t, err)
	require.Empty(t, pins)
}

// Sockets want short names.
func shortDir(t testing.TB) string {
	t.Helper()
	d, err := os.MkdirTemp("", "lf")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(d) })
	return d
}

func TestOpenPointFromStorage(t *testing.T) {
	c, before, _ := files(t)
	t.Setenv("LANDFALL_STATE", filepath.Join(t.TempDir(), "none"))
	o := openPoint(t, "--point", "2", "--from-storage", c.dir)
	require.False(t, o.Pinned)
	require.Empty(t, o.Session)
	requireFiles(t, c, o, before)
	code, errOut := o.stop()
	require.Zero(t, code)
	require.Contains(t, errOut, "not pinned")
}

// The orchestrator goes away and comes back: reads wait, and go on by the pin alone.
func TestOpenPointOutlivesTheOrchestrator(t *testing.T) {
	c, _, _ := files(t)
	s := newSite(t, c)
	t.Setenv("LANDFALL_STATE", s.state)
	o := openPoint(t, "--point", "3", "--disk", "data")
	n, err := nbdclient.Dial(t.Context(), o.uris["data"])
	require.NoError(t, err)
	defer n.Close()
	want := c.at[3]["data"]
	got := make([]byte, len(want))
	require.NoError(t, n.ReadAt(t.Context(), got[:1<<20], 0))
	s.stop()
	done := make(chan error, 1)
	go func() { done <- n.ReadAt(t.Context(), got, 0) }()
	testkit.Eventually(t, 20*time.Second, func() bool { return strings.Contains(o.errs.String(), "reads wait") })
	require.Empty(t, done, "read without an orchestrator")
	s.start()
	require.NoError(t, <-done)
	require.True(t, bytes.Equal(want, got))
	_, errOut := o.stop()
	require.Contains(t, errOut, "reads wait: ")
	require.Contains(t, errOut, "reads go on")
}

// What does not come back within patience fails the read, and the next one is tried again.
func TestOpenPointPatience(t *testing.T) {
	c, _, _ := files(t)
	s := newSite(t, c)
	t.Setenv("LANDFALL_STATE", s.state)
	o := openPoint(t, "--point", "3", "--disk", "data", "--patience", "1s")
	n, err := nbdclient.Dial(t.Context(), o.uris["data"])
	require.NoError(t, err)
	defer n.Close()
	s.stop()
	b := make([]byte, 1<<20)
	at := int64(22 << 20)
	for vdisk.IsZero(c.at[3]["data"][at : at+64<<10]) {
		at -= 64 << 10
	}
	at -= 1<<20 - 64<<10
	var refused *nbdclient.Error
	require.ErrorAs(t, n.ReadAt(t.Context(), b, at), &refused)
	require.EqualValues(t, nbdclient.EIO, refused.Errno)
	s.start()
	require.NoError(t, n.ReadAt(t.Context(), b, at))
	require.True(t, bytes.Equal(c.at[3]["data"][at:at+1<<20], b))
	require.ErrorAs(t, n.WriteAt(t.Context(), b[:512], 0, false), &refused)
	require.EqualValues(t, nbdclient.EPERM, refused.Errno)
}

// Any reads, aligned to sectors or long, by several clients at once, get what the disk held.
func TestOpenPointRandomReads(t *testing.T) {
	c, _, _ := files(t)
	s := newSite(t, c)
	t.Setenv("LANDFALL_STATE", s.state)
	o := openPoint(t, "--point", "3")
	var wg sync.WaitGroup
	for i := range 4 {
		id := []string{"data", "boot"}[i%2]
		wg.Go(func() {
			n, err := nbdclient.Dial(t.Context(), o.uris[id])
			if err != nil {
				t.Error(err)
				return
			}
			defer n.Close()
			rng := rand.New(rand.NewPCG(7, uint64(i)))
			want := c.at[3][id]
			for range 300 {
				length := (1 + rng.IntN(1<<rng.IntN(12))) * 512
				off := rng.IntN((len(want)-length)/512) * 512
				got := make([]byte, length)
				if err := n.ReadAt(t.Context(), got, int64(off)); err != nil || !bytes.Equal(want[off:off+length], got) {
					t.Errorf("%s: %d bytes at %d: %v", id, length, off, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestOpenPointRefusals(t *testing.T) {
	c := newChain(t, map[string][]byte{"os": random(1<<20, 1)})
	s := newSite(t, c)
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer busy.Close()
	for _, tc := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"web", "--listen", "0.0.0.0:0"}, 2, "loopback"},
		{[]string{"web", "--listen", "unix:"}, 2, "path"},
		{[]string{"web", "--point", "yesterday"}, 2, "yesterday"},
		{[]string{"web", "--patience", "0s"}, 2, "patience"},
		{[]string{"web", "--point", "77"}, 1, "POINT_NOT_FOUND"},
		{[]string{"web", "--disk", "tape"}, 1, "DISK_NOT_FOUND"},
		{[]string{"nobody"}, 1, "NOT_PROTECTED"},
		{[]string{"web", "--listen", busy.Addr().String()}, 1, "address already in use"},
		{[]string{"nobody", "--from-storage", c.dir}, 1, "VM_NOT_FOUND"},
		{[]string{"web", "--from-storage", filepath.Join(s.state, "no-store")}, 1, "STORAGE_CONFIG_INVALID"},
	} {
		code, out, errOut := run(t, s.state, append([]string{"points", "open"}, tc.args...)...)
		require.Equal(t, tc.code, code, "%v: %s", tc.args, errOut)
		require.Empty(t, out)
		require.Contains(t, errOut, tc.want, "%v", tc.args)
	}
	pins, err := replica.ReadPins(t.Context(), s.store, pointLineage)
	require.NoError(t, err)
	require.Empty(t, pins, "what failed leaves nothing open")
	// A machine of that name is listed.
	for _, args := range [][]string{{"points", "list", "open"}, {"points", "--", "open"}} {
		code, _, errOut := run(t, s.state, args...)
		require.Equal(t, 1, code)
		require.Contains(t, errOut, "no endpoint of scheduler", "%v", args)
	}
}
