package recovery_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/dir"
	"github.com/landfall-dr/landfall/libs/catalogue"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/segment"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/vdisk"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/vhdtarget"
	"github.com/landfall-dr/landfall/tools/cli"
	"github.com/landfall-dr/landfall/tools/recovery"
)

// runAsLandfall, set in the environment, makes this test program the landfall program.
const runAsLandfall = "LANDFALL_RECOVERY_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(runAsLandfall) != "" {
		os.Exit(cli.Main(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
	goleak.VerifyTestMain(m)
}

const mib = 1 << 20

// content is what every disk of a machine holds.
type content map[string][]byte

// account is a store with machines in it, as a site that is gone left it.
type account struct {
	t     *testing.T
	root  string // of everything
	dir   string // of the store
	store blobstore.Store
	cat   *catalogue.Catalogue
}

func newAccount(t *testing.T) *account {
	t.Helper()
	t.Cleanup(failpoint.Disarm)
	root := t.TempDir()
	store, err := dir.Open(filepath.Join(root, "store"), dir.Options{})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	return &account{t: t, root: root, dir: filepath.Join(root, "store"), store: store, cat: catalogue.Open(store)}
}

// lineage is one protection; n is in its id.
type lineage struct {
	a       *account
	id      replica.Lineage
	r       *replica.Replica
	vm      string
	machine *typesv1.Machine
	config  string
	now     content
	points  map[uint64]content
	next    replica.Ordinal
	base    replica.Ordinal
}

func guid(n int) string { return fmt.Sprintf("6f1c2d3e-0000-4000-8000-%012d", n) }

func lineageID(n int) replica.Lineage {
	return replica.Lineage(fmt.Sprintf("%032x", 0xabc000+n))
}

// protect makes a machine with two disks, a base and two points; the base is applied.
func (a *account) protect(n, vm int, site, title string) *lineage {
	a.t.Helper()
	ctx := testkit.Context(a.t)
	name := "sites/" + site + "/vms/" + guid(vm)
	l := &lineage{a: a, id: lineageID(n), vm: name, points: map[uint64]content{}, now: content{"os": make([]byte, 3*mib), "data": make([]byte, mib+512)},
		machine: &typesv1.Machine{
			Name: name, Id: guid(vm), DisplayName: title, Generation: 2, Cpus: 2, MemoryBytes: 4 << 30, Host: "sites/" + site + "/hosts/host-1",
			Disks: []*typesv1.Disk{{Id: "os", SizeBytes: 3 * mib, OsDisk: true}, {Id: "data", SizeBytes: mib + 512}},
		}}
	var err error
	l.r, err = replica.Create(ctx, a.store, l.id)
	require.NoError(a.t, err)
	raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(l.machine)
	require.NoError(a.t, err)
	var members map[string]any
	require.NoError(a.t, json.Unmarshal(raw, &members))
	members["v"] = 1
	raw, err = json.Marshal(members)
	require.NoError(a.t, err)
	l.config, err = l.r.PutConfig(ctx, raw)
	require.NoError(a.t, err)

	l.write("os", 0, 300<<10, uint64(100*n+1))
	l.write("data", mib, 512, uint64(100*n+2))
	l.commit(replica.KindPartial, replica.ConsistencyCrash, "os", "data")
	l.commit(replica.KindBase, replica.ConsistencyCrash)
	l.apply()
	l.write("os", 100<<10, 64<<10, uint64(100*n+3))
	l.commit(replica.KindPoint, replica.ConsistencyApp, "os")
	l.write("data", 4096, 8192, uint64(100*n+4))
	l.commit(replica.KindPoint, replica.ConsistencyCrash, "data")
	return l
}

func (l *lineage) write(disk string, off, n int64, seed uint64) {
	testkit.Fill(l.now[disk][off:off+n], seed)
}

// apply brings the replica's disks up.
func (l *lineage) apply() {
	l.a.t.Helper()
	ap, err := replica.NewApplier(l.r, replica.ApplierOptions{Footer: func(_ string, size int64) []byte {
		f, err := vdisk.NewFooter(size, uuid.Nil, time.Unix(1e9, 0))
		require.NoError(l.a.t, err)
		b := f.Bytes()
		return b[:]
	}})
	require.NoError(l.a.t, err)
	_, err = ap.Advance(testkit.Context(l.a.t), 0)
	require.NoError(l.a.t, err)
}

// commit ships whole disks as they are now.
func (l *lineage) commit(kind replica.Kind, consistency replica.Consistency, changed ...string) {
	l.a.t.Helper()
	require.NoError(l.a.t, l.try(kind, consistency, changed...))
}

func (l *lineage) try(kind replica.Kind, consistency replica.Consistency, changed ...string) error {
	l.a.t.Helper()
	ctx := testkit.Context(l.a.t)
	l.next++
	p := replica.Proposal{Kind: kind, Epoch: 1, Base: l.base}
	h := segment.Header{Lineage: l.id.Bytes(), Gen: 1, Kind: segment.KindPoint, Ordinal: uint64(l.next)}
	if kind == replica.KindPartial {
		p.Pass, h.Kind, h.Task = &replica.Pass{Ordinal: l.next, I: 1, K: 1}, segment.KindPass, 1
	} else {
		p.Point, p.Config, p.Consistency = l.next, l.config, consistency
		p.CutTime = time.Date(2026, 11, 22, 10, 0, int(l.next), 0, time.UTC)
	}
	tx := replica.NewTx()
	for _, id := range slices.Sorted(maps.Keys(l.now)) {
		h.DiskID, h.DiskSize = id, int64(len(l.now[id]))
		d := replica.Disk{ID: id, Gen: 1, Size: h.DiskSize}
		if slices.Contains(changed, id) {
			w, err := segment.NewWriter(h, nil, segment.Options{Compression: segment.None})
			require.NoError(l.a.t, err)
			require.NoError(l.a.t, w.Data(0, l.now[id]))
			body, sha, _, err := w.Finish()
			require.NoError(l.a.t, err)
			s, err := l.r.PutSegment(ctx, replica.SegmentKey{Kind: kind, Ordinal: l.next, Tx: tx, DiskID: id}, body, sha)
			require.NoError(l.a.t, err)
			d.Segments = []replica.Segment{s}
		}
		p.Disks = append(p.Disks, d)
	}
	if _, err := l.r.Commit(ctx, p); err != nil {
		return err
	}
	l.base = l.next
	if kind.IsPoint() {
		now := content{}
		for id, b := range l.now {
			now[id] = bytes.Clone(b)
		}
		l.points[uint64(l.next)] = now
	}
	return nil
}

// catalogued writes what the scheduler would.
func (l *lineage) catalogued(ended time.Time) {
	l.a.t.Helper()
	l.a.record(&catalogue.Record{Ended: ended, VM: &catalogue.VM{
		Site: strings.Split(l.vm, "/")[1], ID: l.machine.Id, DisplayName: l.machine.DisplayName, Lineage: string(l.id), Host: l.machine.Host,
		Policy: "policies/gold", Created: time.Date(2026, 11, 22, 9, 0, 0, 0, time.UTC),
	}})
}

func (a *account) record(r *catalogue.Record) {
	a.t.Helper()
	ctx := testkit.Context(a.t)
	r.Written = time.Date(2026, 11, 22, 9, 0, 0, 0, time.UTC)
	_, v, err := a.cat.Get(ctx, r.Name())
	require.NoError(a.t, err)
	_, err = a.cat.Put(ctx, r, v)
	require.NoError(a.t, err)
}

func (a *account) policy() {
	a.record(&catalogue.Record{Policy: &schedulerv1.Policy{Name: "policies/gold", CopyInterval: durationpb.New(30 * time.Second)}})
}

func (a *account) plan(name string, wait time.Duration, groups ...[]string) {
	p := &failoverv1.RecoveryPlan{Name: "recoveryPlans/" + name}
	for i, vms := range groups {
		p.Groups = append(p.Groups, &failoverv1.PlanGroup{Title: fmt.Sprint("group ", i+1), Vms: vms, Wait: durationpb.New(wait)})
	}
	a.record(&catalogue.Record{Plan: p})
}

// put replaces an object, as damage does.
func (a *account) put(container, name, text string) {
	a.t.Helper()
	_, err := a.store.Container(container).Put(testkit.Context(a.t), name, strings.NewReader(text), int64(len(text)), blobstore.Conditions{})
	require.NoError(a.t, err)
}

// requireCopy compares a folder's VHDs with a point.
func (l *lineage) requireCopy(folder string, point uint64) {
	l.a.t.Helper()
	require.NotNil(l.a.t, l.points[point])
	for id, want := range l.points[point] {
		raw, err := os.ReadFile(filepath.Join(folder, id+".vhd"))
		require.NoError(l.a.t, err)
		require.True(l.a.t, bytes.Equal(want, raw[:len(want)]), "disk %s of point %d", id, point)
	}
	raw, err := os.ReadFile(filepath.Join(folder, "vm.json"))
	require.NoError(l.a.t, err)
	var vm struct {
		Point   uint64
		Lineage string
		Machine struct {
			DisplayName string `json:"display_name"`
			Disks       []any
		}
	}
	require.NoError(l.a.t, json.Unmarshal(raw, &vm))
	require.Equal(l.a.t, point, vm.Point)
	require.Equal(l.a.t, string(l.id), vm.Lineage)
	require.Equal(l.a.t, l.machine.DisplayName, vm.Machine.DisplayName)
	require.Len(l.a.t, vm.Machine.Disks, 2)
}

// session works on the account with a role's rights, or all of them.
func (a *account) session(store blobstore.Store) *recovery.Session {
	return recovery.New(recovery.Options{Store: store, Targets: map[failoverv1.TargetKind]target.Target{failoverv1.TargetKind_TARGET_KIND_VHD: vhdtarget.Target{}}, Host: "rescue"})
}

// result of a command.
type result struct {
	args     []string
	out, err string
	code     int
}

// run is `landfall recover --from-storage STORE args`.
func (a *account) run(args ...string) result {
	a.t.Helper()
	all := append([]string{"recover", "--from-storage", a.dir, "--state", filepath.Join(a.root, "no-state")}, args...)
	var out, errOut bytes.Buffer
	code := cli.Main(testkit.Context(a.t), all, strings.NewReader(""), &out, &errOut)
	return result{append([]string{"recover", "--from-storage", a.dir}, args...), out.String(), errOut.String(), code}
}

func (a *account) ok(args ...string) result {
	a.t.Helper()
	r := a.run(args...)
	require.Zero(a.t, r.code, "%v\n%s%s", args, r.out, r.err)
	return r
}

// refused runs a command that must fail with a reason, and shows it.
func (a *account) refused(reason typesv1.ErrorReason, args ...string) string {
	a.t.Helper()
	r := a.run(args...)
	require.NotZero(a.t, r.code, "%v\n%s", args, r.out)
	require.Contains(a.t, r.err, strings.TrimPrefix(reason.String(), "ERROR_REASON_"), "%v", args)
	for _, label := range []string{"what happened: ", "likely cause:  ", "what to do:    "} {
		require.Contains(a.t, r.err, label)
	}
	return a.transcript(r)
}

var (
	newID    = regexp.MustCompile(`recover-[0-9a-f]{8}-[0-9a-f-]{27}`)
	segTx    = regexp.MustCompile(`seg/(\d+)-[0-9a-f]{16}`)
	bytesNow = regexp.MustCompile(`(?m)^ +\d+%  .*\n`)
)

func (a *account) transcript(r result) string {
	s := fmt.Sprintf("$ landfall %s\n%s%s[exit %d]\n\n", strings.Join(r.args, " "), r.out, r.err, r.code)
	s = strings.ReplaceAll(s, a.root, "<dir>")
	s = segTx.ReplaceAllString(s, "seg/$1-<tx>")
	s = bytesNow.ReplaceAllString(s, "")
	s = newID.ReplaceAllString(s, "<new id>")
	var b strings.Builder
	for line := range strings.Lines(s) {
		b.WriteString(strings.Join(strings.Fields(line), " ") + "\n")
	}
	return b.String()
}

func golden(t *testing.T, file, got string) {
	t.Helper()
	path := filepath.Join("testdata", file)
	if os.Getenv("LANDFALL_UPDATE") != "" {
		require.NoError(t, os.MkdirAll("testdata", 0o750))
		require.NoError(t, os.WriteFile(path, []byte(got), 0o600))
		return
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err, "LANDFALL_UPDATE=1 go test writes it")
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); diff != "" {
		t.Errorf("%s differs; LANDFALL_UPDATE=1 go test rewrites it:\n%s", path, diff)
	}
}
