// Package byhand_test recovers machines as somebody does who has lost everything but the storage and docs/formats: by
// docs/formats/recover-by-hand/recover.py, which is written from those pages and shares no code with Landfall.
package byhand_test

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/backend"
	"github.com/landfall-dr/landfall/libs/blobstore/dir"
	"github.com/landfall-dr/landfall/libs/config"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/segment"
	"github.com/landfall-dr/landfall/libs/shipping"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/testkit/azurite"
	"github.com/landfall-dr/landfall/libs/vdisk"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	mib  = 1 << 20
	vmID = "6f1c2d3e-0000-4000-8000-000000000077"
)

// content is what every disk of a machine holds.
type content map[string][]byte

// byHand is a lineage that goes through everything a chain can hold, and the script that reads it from docs/formats alone.
type byHand struct {
	t      *testing.T
	where  string // what the script is told
	store  blobstore.Store
	id     replica.Lineage
	r      *replica.Replica
	config string
	rng    *rand.Rand
	epoch  replica.Epoch
	open   replica.Seq
	next   replica.Ordinal
	base   replica.Ordinal
	gens   map[string]uint32
	now    content
	points map[replica.Ordinal]content

	runs       int // of the script
	spent, cpu time.Duration
}

// edit changes a range of a disk; zero says that it is zero now.
type edit struct {
	disk   string
	off, n int64
	zero   bool
}

func needsPrograms(t *testing.T) {
	t.Helper()
	for _, p := range []string{"python3", "zstd"} {
		if _, err := exec.LookPath(p); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is needed here: %v", p, err)
			}
			t.Skipf("SKIPPED: NOBODY HAS TRIED docs/formats BY HAND: %s is not installed", p)
		}
	}
}

func newByHand(t *testing.T, store blobstore.Store, where string) *byHand {
	h := &byHand{
		t: t, where: where, store: store, id: "0000000000000000000000000000abcd", rng: testkit.RandOf(77), epoch: 1, next: 1,
		gens:   map[string]uint32{"os": 1, "data": 1},
		now:    content{"os": make([]byte, mib+5*512), "data": make([]byte, 512<<10)},
		points: map[replica.Ordinal]content{},
	}
	var err error
	h.r, err = replica.Create(testkit.Context(t), store, h.id)
	require.NoError(t, err)
	h.config, err = h.r.PutConfig(testkit.Context(t), []byte(`{"v":1,"name":"sites/lab/vms/`+vmID+`","id":"`+vmID+`","display_name":"by hand"}`))
	require.NoError(t, err)
	return h
}

// mixed is data of every kind an encoder knows: text, noise, periods short and long, counters, long runs, and zeros.
func (h *byHand) mixed(p []byte) {
	for len(p) > 0 {
		n := min(len(p), 512<<h.rng.IntN(8))
		b := p[:n]
		switch h.rng.IntN(7) {
		case 0:
			testkit.Text(b, h.rng.Uint64())
		case 1:
			testkit.Fill(b, h.rng.Uint64())
		case 2, 3: // one period, here and there something else
			period := 1 + h.rng.IntN(1<<(1+h.rng.IntN(12)))
			testkit.Fill(b[:min(n, period)], h.rng.Uint64())
			for i := period; i < n; i++ {
				b[i] = b[i-period]
			}
			for range h.rng.IntN(20) {
				b[h.rng.IntN(n)]++
			}
		case 4:
			for i := 0; i+8 <= n; i += 8 {
				binary.LittleEndian.PutUint64(b[i:], uint64(i)*uint64(n))
			}
		case 5:
			for i := range b {
				b[i] = byte(n)
			}
		case 6:
			clear(b)
		}
		p = p[n:]
	}
}

// segments stores edits of one disk, which are in order.
func (h *byHand) segments(hd segment.Header, kind replica.Kind, ordinal replica.Ordinal, tx replica.Tx, how segment.Compression, edits []edit) (out []replica.Segment) {
	h.t.Helper()
	var w *segment.Writer
	finish := func() {
		if w == nil {
			return
		}
		body, sha, _, err := w.Finish()
		require.NoError(h.t, err)
		s, err := h.r.PutSegment(testkit.Context(h.t), replica.SegmentKey{Kind: kind, Ordinal: ordinal, Tx: tx, DiskID: hd.DiskID, K: len(out)}, body, sha)
		require.NoError(h.t, err)
		out, w = append(out, s), nil
	}
	for i, e := range edits {
		if e.disk != hd.DiskID {
			continue
		}
		if w == nil {
			var err error
			w, err = segment.NewWriter(hd, nil, segment.Options{Compression: how})
			require.NoError(h.t, err)
		}
		p := h.now[e.disk][e.off : e.off+e.n]
		if e.zero {
			clear(p)
			require.NoError(h.t, w.Zero(e.off, e.n))
		} else {
			h.mixed(p)
			require.NoError(h.t, w.Data(e.off, p))
		}
		if i%3 == 2 { // several segments of a disk
			finish()
		}
	}
	finish()
	return out
}

func (h *byHand) disks(kind replica.Kind, hd segment.Header, how segment.Compression, edits []edit) (out []replica.Disk) {
	tx := replica.NewTx()
	hd.Lineage = h.id.Bytes()
	for _, id := range slices.Sorted(maps.Keys(h.now)) {
		hd.DiskID, hd.Gen, hd.DiskSize = id, h.gens[id], int64(len(h.now[id]))
		d := replica.Disk{ID: id, Gen: hd.Gen, Size: hd.DiskSize}
		d.Segments = h.segments(hd, kind, replica.Ordinal(hd.Ordinal), tx, how, edits)
		if len(d.Segments) > 0 || kind != replica.KindPartial {
			out = append(out, d)
		}
	}
	return out
}

// pass stores one partial for each group of edits.
func (h *byHand) pass(how segment.Compression, groups ...[]edit) {
	h.t.Helper()
	o := h.next
	h.next++
	for i, edits := range groups {
		task := uint32(i + 1)
		d := h.disks(replica.KindPartial, segment.Header{Kind: segment.KindPass, Ordinal: uint64(o), Task: task}, how, edits)
		_, err := h.r.Commit(testkit.Context(h.t), replica.Proposal{Kind: replica.KindPartial, Epoch: h.epoch, Open: h.open,
			Pass: &replica.Pass{Ordinal: o, I: task, K: uint32(len(groups))}, Base: h.base, Disks: d})
		require.NoError(h.t, err)
	}
	h.base = o
}

func (h *byHand) point(kind replica.Kind, how segment.Compression, edits ...edit) replica.Ordinal {
	h.t.Helper()
	o := h.next
	h.next++
	p := replica.Proposal{Kind: kind, Epoch: h.epoch, Open: h.open, Point: o, Base: h.base, CutTime: time.Date(2026, 11, 22, 10, 0, int(o), 0, time.UTC),
		Consistency: replica.ConsistencyCrash, Config: h.config}
	if o%2 == 0 {
		p.Signals = &replica.Signals{Changed: 4096}
	}
	p.Disks = h.disks(kind, segment.Header{Kind: segment.KindPoint, Ordinal: uint64(o)}, how, edits)
	_, err := h.r.Commit(testkit.Context(h.t), p)
	require.NoError(h.t, err)
	h.base, h.points[o] = o, content{}
	for id, b := range h.now {
		h.points[o][id] = bytes.Clone(b)
	}
	return o
}

// apply brings the page blobs up to the head, with checkpoints at points.
func (h *byHand) apply(checkpoints ...replica.Ordinal) {
	h.t.Helper()
	ap, err := replica.NewApplier(h.r, replica.ApplierOptions{
		Footer: func(disk string, size int64) []byte {
			f, err := shipping.Footer(h.id, disk, size)
			require.NoError(h.t, err)
			return f
		},
		Takeover: true,
		Stop:     func(e replica.Entry) bool { return e.Kind.IsPoint() && slices.Contains(checkpoints, e.Ordinal) },
	})
	require.NoError(h.t, err)
	_, err = ap.Advance(testkit.Context(h.t), 0)
	require.NoError(h.t, err)
}

// grow replaces a disk by a larger one, as a new generation, and returns the edits that fill it.
func (h *byHand) grow(id string, size int64) edit {
	h.gens[id]++
	h.now[id] = make([]byte, size)
	return edit{disk: id, n: size / 3 / 512 * 512}
}

// failover closes the lineage, sets it back and opens it again with the state of target.
func (h *byHand) failover(name string, target replica.Ordinal) {
	h.t.Helper()
	ctx := testkit.Context(h.t)
	fence := replica.FenceOptions{Failover: name}
	_, err := h.r.CloseLineage(ctx, fence)
	require.NoError(h.t, err)
	_, err = h.r.Rewind(ctx, replica.RewindOptions{Failover: name, Target: target, Parallel: 1})
	require.NoError(h.t, err)
	_, err = h.r.ReopenLineage(ctx, replica.ReopenOptions{FenceOptions: fence})
	require.NoError(h.t, err)
	st, err := h.r.Refresh(ctx)
	require.NoError(h.t, err)
	require.Equal(h.t, target, st.StateOrdinal)
	h.epoch, h.open, h.base = st.Epoch, st.Open, target
	for id, b := range h.points[target] {
		h.now[id] = bytes.Clone(b)
	}
}

// live is the lineage's life.
func (h *byHand) live() (pinned replica.Ordinal) {
	const kib = 1 << 10
	h.pass(segment.Fast, []edit{{disk: "os", n: 400 * kib}}, []edit{{disk: "os", off: mib, n: 5 * 512}, {disk: "data", n: 256 * kib}})
	h.point(replica.KindBase, segment.None, edit{disk: "os", off: 512, n: 1536}) // 2
	h.apply()
	h.point(replica.KindPoint, segment.Fast, edit{disk: "os", off: 64 * kib, n: 130 * kib}, edit{disk: "os", off: 300 * kib, n: 212 * kib, zero: true}, edit{disk: "data", off: 300 * kib, n: 20 * kib})
	h.point(replica.KindPoint, segment.Small, edit{disk: "data", n: 200 * kib}, edit{disk: "data", off: 300 * kib, n: 512}, edit{disk: "data", off: 310 * kib, n: 100 * kib, zero: true})
	h.apply(4)
	h.point(replica.KindPoint, segment.Fast) // 5: nothing changed
	pinned = h.point(replica.KindPoint, segment.Small, edit{disk: "os", off: mib - 100*kib, n: 100*kib + 512}, edit{disk: "data", off: 3 * kib, n: 5 * kib})
	grown := h.grow("data", mib+512)
	h.now["log"], h.gens["log"] = make([]byte, 200*kib+512), 1 // and a disk that was not there
	seven := h.point(replica.KindPoint, segment.Fast, grown, edit{disk: "log", off: 512, n: 200 * kib})
	h.point(replica.KindPoint, segment.Fast, edit{disk: "data", n: 40 * kib}, edit{disk: "os", n: 512 * kib, zero: true})
	h.apply(8)
	h.point(replica.KindPoint, segment.None, edit{disk: "log", n: 9 * kib}, edit{disk: "data", off: 300 * kib, n: 300 * kib, zero: true}) // 9
	h.failover("f-1", seven)
	h.point(replica.KindPoint, segment.Fast, edit{disk: "data", off: 5 * kib, n: 56 * kib}) // 10
	h.pass(segment.Small, []edit{{disk: "data", n: 100 * kib}}, []edit{{disk: "os", off: 512 * kib, n: 70 * kib}, {disk: "log", off: 8 * kib, n: 8 * kib, zero: true}})
	h.point(replica.KindPoint, segment.Fast, edit{disk: "os", off: 512 * kib, n: 28 * kib}) // 12
	h.apply()
	h.point(replica.KindPoint, segment.Fast, edit{disk: "log", n: 64 * kib})
	h.apply(13)
	h.point(replica.KindPoint, segment.Small, edit{disk: "os", n: 28 * kib})
	h.point(replica.KindPoint, segment.Fast, edit{disk: "os", n: 70 * kib}, edit{disk: "data", off: 512, n: 130 * kib})
	return pinned
}

// script runs recover.py on the store.
func (h *byHand) script(args ...string) (out, errs string, err error) {
	h.t.Helper()
	cmd := exec.CommandContext(testkit.Context(h.t), "python3", append([]string{"../../../docs/formats/recover-by-hand/recover.py", h.where}, args...)...)
	cmd.Env = append(os.Environ(), "PYTHONDONTWRITEBYTECODE=1", "no_proxy=127.0.0.1")
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	began := time.Now()
	err = cmd.Run()
	h.runs++
	h.spent += time.Since(began)
	h.cpu += cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return o.String(), e.String(), err
}

// listed is a point in the script's list.
type listed struct {
	Point       replica.Ordinal
	JournalOnly bool `json:"journal_only"`
}

func (h *byHand) list() (vm string, points []listed) {
	h.t.Helper()
	out, errs, err := h.script("list", "--json")
	require.NoError(h.t, err, "%s", errs)
	var all []struct {
		Lineage, VM string
		Points      []listed
	}
	require.NoError(h.t, json.Unmarshal([]byte(out), &all))
	require.Len(h.t, all, 1)
	require.Equal(h.t, string(h.id), all[0].Lineage)
	return all[0].VM, all[0].Points
}

// verify recovers the points from one on by hand and compares it with what Materialise writes and with what the guest wrote.
func (h *byHand) verify(from replica.Ordinal) (journalOnly int) {
	h.t.Helper()
	vm, points := h.list()
	require.Equal(h.t, "by hand", vm)
	want, err := h.r.Points(testkit.Context(h.t))
	require.NoError(h.t, err)
	require.Len(h.t, points, len(want))
	for n, w := range want {
		i := slices.IndexFunc(points, func(l listed) bool { return l.Point == w.Ordinal })
		require.GreaterOrEqual(h.t, i, 0, "point %d is not in the script's list", w.Ordinal)
		if points[i].JournalOnly {
			journalOnly++
		}
		if w.Ordinal < from {
			continue
		}
		sink := handSink{}
		m, err := h.r.Materialise(testkit.Context(h.t), w.Ordinal, sink, replica.MaterialiseOptions{})
		require.NoError(h.t, err)
		require.Len(h.t, m.Disks, len(h.points[w.Ordinal]))
		h.recovered(sink, w.Ordinal)
		switch {
		case points[i].JournalOnly && w.Ordinal%4 == 0:
			h.recovered(sink, w.Ordinal, "--journal-only", "--raw")
		case n == len(want)-1 && !points[i].JournalOnly:
			_, errs, err := h.script(string(h.id), fmt.Sprint(w.Ordinal), h.t.TempDir(), "--journal-only")
			require.Error(h.t, err)
			require.Contains(h.t, errs, "neither checkpoint nor journal leads to it")
		}
	}
	return journalOnly
}

// recovered recovers one point by hand.
func (h *byHand) recovered(want handSink, o replica.Ordinal, flags ...string) {
	h.t.Helper()
	folder := h.t.TempDir()
	_, errs, err := h.script(append([]string{string(h.id), fmt.Sprint(o), folder}, flags...)...)
	require.NoError(h.t, err, "point %d %v: %s", o, flags, errs)
	raw := slices.Contains(flags, "--raw")
	for id, b := range h.points[o] {
		require.True(h.t, bytes.Equal(b, want[id]), "Materialise: disk %s of point %d", id, o)
		if raw {
			got, err := os.ReadFile(filepath.Join(folder, id+".raw"))
			require.NoError(h.t, err)
			require.True(h.t, bytes.Equal(b, got), "by hand %v: disk %s of point %d", flags, id, o)
			continue
		}
		size := (int64(len(b)) + mib - 1) / mib * mib
		got, err := os.ReadFile(filepath.Join(folder, id+".vhd"))
		require.NoError(h.t, err)
		require.Len(h.t, got, int(size)+512)
		require.True(h.t, bytes.Equal(b, got[:len(b)]), "by hand: disk %s of point %d", id, o)
		require.Empty(h.t, bytes.Trim(got[len(b):size], "\x00"), "padding")
		f, err := vdisk.ParseFooter(got[size:])
		require.NoError(h.t, err)
		ours, err := vdisk.NewFooter(size, f.UniqueID, f.Created)
		require.NoError(h.t, err)
		o := ours.Bytes()
		require.Equal(h.t, o[:], got[size:], "the footer, geometry too")
	}
}

// handSink collects disks in memory.
type handSink content

type handDisk []byte

func (s handSink) Disk(_ context.Context, d replica.DiskState) (replica.DiskSink, error) {
	s[d.ID] = make([]byte, d.Size)
	return handDisk(s[d.ID]), nil
}

func (d handDisk) WriteAt(_ context.Context, p []byte, off int64) error {
	copy(d[off:], p)
	return nil
}

func (handDisk) Finish(context.Context) error { return nil }

// TestByHand: whoever has lost everything but the storage, and has the documents, gets every point back, byte for byte. The
// script is written from docs/formats and shares no code with us, so it also says when the documents and the code part.
func TestByHand(t *testing.T) {
	needsPrograms(t)
	backends := map[string]func(t *testing.T) (blobstore.Store, string){
		"dir": func(t *testing.T) (blobstore.Store, string) {
			folder := filepath.Join(t.TempDir(), "store")
			s, err := dir.Open(folder, dir.Options{})
			require.NoError(t, err)
			return s, folder
		},
		"azurite": func(t *testing.T) (blobstore.Store, string) {
			srv := azurite.Start(t)
			set := backend.DefaultSettings()
			set.Azure.ConnectionString = config.NewSecret(srv.ConnectionString())
			s, err := backend.Open(testkit.Context(t), set, backend.Options{})
			require.NoError(t, err)
			return s, srv.URL() + "?" + accountSAS(t, srv.Account, srv.Key)
		},
	}
	for _, name := range slices.Sorted(maps.Keys(backends)) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			store, where := backends[name](t)
			t.Cleanup(func() { require.NoError(t, store.Close()) })
			h := newByHand(t, store, where)
			pinned := h.live()
			from := replica.Ordinal(0)
			if name == "azurite" {
				from = pinned + 6 // the others are read from there after retention, or by dir
			}
			require.Equal(t, len(h.points), h.verify(from), "nothing is retired yet: journals alone lead to all points")

			ctx := testkit.Context(t)
			if name == "dir" {
				// Everything is young: nothing is retired, and what passes left in staging is released.
				h.older(8)
				res, err := h.r.Retain(ctx, replica.RetainOptions{OrphanAge: -1})
				require.NoError(t, err)
				require.Zero(t, res.Floor)
				require.Positive(t, res.Deleted["staging"])
				require.Zero(t, h.verify(pinned+6), "no journal leads from the beginning any more, checkpoints do")
			}
			seq, err := h.r.Find(ctx, pinned)
			require.NoError(t, err)
			require.NoError(t, h.r.Pin(ctx, replica.Pin{Seq: seq.Seq, Owner: "hold/audit"}))
			res, err := h.r.Retain(ctx, replica.RetainOptions{Now: time.Now().Add(1000 * time.Hour), OrphanAge: -1})
			require.NoError(t, err)
			require.Positive(t, res.Floor, "a floor")
			require.Positive(t, res.Ranges, "and a range above it")
			require.Positive(t, res.Deleted["manifests"])
			require.Less(t, h.verify(0), len(h.points))

			if name == "azurite" {
				h.copied()
			}
			h.damage()
			t.Logf("%d runs of the script took %s, %s of processor time", h.runs, h.spent.Round(time.Millisecond), h.cpu.Round(time.Millisecond))
		})
	}
}

// copied downloads the containers into a folder, as docs/formats/recover-by-hand/README.md section 4 says, and recovers there.
func (h *byHand) copied() {
	h.t.Helper()
	ctx := testkit.Context(h.t)
	folder := h.t.TempDir()
	write := func(name string, b []byte) {
		path := filepath.Join(folder, filepath.FromSlash(name))
		require.NoError(h.t, os.MkdirAll(filepath.Dir(path), 0o750))
		require.NoError(h.t, os.WriteFile(path, b, 0o600))
	}
	pages := map[string]bool{}
	for _, name := range []string{h.id.JournalContainer(), h.id.StagingContainer(), h.id.ReplicaContainer()} {
		c := h.store.Container(name)
		for p, err := range c.List(ctx, "", "") {
			require.NoError(h.t, err)
			at := "containers/" + name + "/" + p.Name
			if !strings.HasPrefix(p.Name, "disks/") {
				write(at+"@b", h.getFrom(name, p.Name))
				continue
			}
			for s, err := range c.ListSnapshots(ctx, p.Name) {
				require.NoError(h.t, err)
				data := make([]byte, s.Size)
				require.NoError(h.t, c.ReadPages(ctx, p.Name, s.Snapshot, 0, data))
				write(at+"@p/snap/"+string(s.Snapshot)+"/data", data)
				write(at+"@p/snap/"+string(s.Snapshot)+"/meta.json", fmt.Appendf(nil, `{"v":1,"size":%d,"metadata":{"seq":%q}}`, s.Size, s.Metadata["seq"]))
				pages[p.Name] = true
			}
		}
	}
	require.Len(h.t, pages, 4, "the disks and generations")
	write("format.json", []byte(`{"format":"landfall-dir-store","version":1}`))
	elsewhere := *h
	elsewhere.where = folder
	newest := h.next - 1
	sink := handSink{}
	_, err := h.r.Materialise(ctx, newest, sink, replica.MaterialiseOptions{})
	require.NoError(h.t, err)
	elsewhere.recovered(sink, newest)
}

// older makes the first n manifests of the chain of version 1, as an old uploader wrote them, and links the others anew.
func (h *byHand) older(n replica.Seq) {
	h.t.Helper()
	ctx := testkit.Context(h.t)
	st, err := h.r.Refresh(ctx)
	require.NoError(h.t, err)
	prev := ""
	for seq := replica.Seq(1); seq <= st.Head; seq++ {
		name := fmt.Sprintf("log/%012d.json", seq)
		raw := h.get(name)
		if seq <= n {
			raw = bytes.Replace(raw, []byte(`"v":2`), []byte(`"v":1`), 1)
			if i := bytes.Index(raw, []byte(`"signals":{`)); i >= 0 {
				end := i + bytes.Index(raw[i:], []byte("},")) + 2
				raw = slices.Concat(raw[:i], raw[end:])
			}
		}
		if seq > 1 {
			i := bytes.Index(raw, []byte(`"prev":"`)) + len(`"prev":"`)
			raw = slices.Concat(raw[:i], []byte(prev), raw[i+64:])
		}
		h.put(name, raw)
		prev = fmt.Sprintf("%x", sha256.Sum256(raw))
	}
	h.r, err = replica.Open(ctx, h.store, h.id)
	require.NoError(h.t, err)
}

// get and put read and replace an object of the journal.
func (h *byHand) get(name string) []byte { return h.getFrom(h.id.JournalContainer(), name) }

func (h *byHand) getFrom(container, name string) []byte {
	h.t.Helper()
	r, _, err := h.store.Container(container).Get(testkit.Context(h.t), name, 0, -1)
	require.NoError(h.t, err)
	defer func() { require.NoError(h.t, r.Close()) }()
	b, err := io.ReadAll(r)
	require.NoError(h.t, err)
	return b
}

func (h *byHand) put(name string, b []byte) {
	h.t.Helper()
	_, err := h.store.Container(h.id.JournalContainer()).Put(testkit.Context(h.t), name, bytes.NewReader(b), int64(len(b)), blobstore.Conditions{})
	require.NoError(h.t, err)
}

// damage: what is wrong is named, and nothing that looks like a disk is left behind.
func (h *byHand) damage() {
	h.t.Helper()
	ctx := testkit.Context(h.t)
	newest := h.next - 1
	m, err := h.r.Find(ctx, newest)
	require.NoError(h.t, err)
	journal, log := h.store.Container(h.id.JournalContainer()), fmt.Sprintf("log/%012d.json", m.Seq)
	segments := m.Disks[slices.IndexFunc(m.Disks, func(d replica.Disk) bool { return d.ID == "data" })].Segments
	require.NotEmpty(h.t, segments)
	name := segments[0].Name
	refused := func(obj, what string) {
		h.t.Helper()
		folder := h.t.TempDir()
		_, errs, err := h.script(string(h.id), fmt.Sprint(newest), folder)
		require.Error(h.t, err, "the script noticed nothing")
		require.Contains(h.t, errs, obj)
		require.Contains(h.t, errs, what)
		require.NotContains(h.t, errs, "Traceback")
		require.NoFileExists(h.t, filepath.Join(folder, "data.vhd"))
	}

	whole := h.get(name)
	bad := bytes.Clone(whole)
	bad[len(bad)/2] ^= 1
	h.put(name, bad)
	refused(h.id.JournalContainer()+"/"+name, "SHA-256")
	require.NoError(h.t, journal.Delete(ctx, name, blobstore.Conditions{}))
	refused(h.id.JournalContainer()+"/"+name, "not there")

	// The segment and its manifest were made to agree: the frame's CRC is still wrong.
	h.put(name, bad)
	manifest := h.get(log)
	sum := sha256.Sum256(bad)
	h.put(log, bytes.Replace(manifest, []byte(segments[0].SHA256), fmt.Appendf(nil, "%x", sum), 1))
	refused(h.id.JournalContainer()+"/"+name, "frame")
	h.put(name, whole)

	h.put(log, append([]byte(" "), manifest...)) // the head: nothing above says its hash
	below := fmt.Sprintf("log/%012d.json", m.Seq-1)
	intact := h.get(below)
	h.put(below, append([]byte(" "), intact...))
	refused(h.id.JournalContainer()+"/"+log, "prev")
	require.NoError(h.t, journal.Delete(ctx, below, blobstore.Conditions{}))
	refused(h.id.JournalContainer()+"/"+below, "gap")
	lower := newest - 2
	folder := h.t.TempDir()
	_, errs, err := h.script(string(h.id), fmt.Sprint(lower), folder)
	require.NoError(h.t, err, "points below the damage can be read: %s", errs)
	require.Contains(h.t, errs, "gap")
	got, err := os.ReadFile(filepath.Join(folder, "os.vhd"))
	require.NoError(h.t, err)
	require.True(h.t, bytes.Equal(h.points[lower]["os"], got[:len(h.points[lower]["os"])]))
	h.put(below, intact)
	h.put(log, manifest)

	// Without the snapshots there is no way to it any more; the checkpoint's journals were retired.
	replicas := h.store.Container(h.id.ReplicaContainer())
	for p, err := range replicas.List(ctx, "disks/os/", "") {
		require.NoError(h.t, err)
		require.NoError(h.t, replicas.Delete(ctx, p.Name, blobstore.Conditions{}))
	}
	_, errs, err = h.script(string(h.id), strconv.Itoa(int(newest)), h.t.TempDir())
	require.Error(h.t, err)
	require.Contains(h.t, errs, "disks/os/g0001.vhd snapshot")
}

// accountSAS may read and list everything for an hour. The string to sign is that of the service's documentation.
func accountSAS(t *testing.T, account, key string) string {
	t.Helper()
	const version = "2021-12-02"
	secret, err := base64.StdEncoding.DecodeString(key)
	require.NoError(t, err)
	end := time.Now().UTC().Add(time.Hour).Format("2006-01-02T15:04:05Z")
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(strings.Join([]string{account, "rl", "b", "sco", "", end, "", "https,http", version, "", ""}, "\n")))
	return url.Values{"sv": {version}, "ss": {"b"}, "srt": {"sco"}, "sp": {"rl"}, "se": {end}, "spr": {"https,http"},
		"sig": {base64.StdEncoding.EncodeToString(mac.Sum(nil))}}.Encode()
}
