package recovery_test

import (
	"context"
	"encoding/json"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/catalogue"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/tools/recovery"
)

const (
	vmNotFound   = typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND
	invalid      = typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT
	noPoint      = typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND
	noPlan       = typesv1.ErrorReason_ERROR_REASON_PLAN_NOT_FOUND
	badPlan      = typesv1.ErrorReason_ERROR_REASON_PLAN_INVALID
	notEmpty     = typesv1.ErrorReason_ERROR_REASON_TARGET_NOT_EMPTY
	unwritable   = typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE
	closedReason = typesv1.ErrorReason_ERROR_REASON_LINEAGE_CLOSED
	broken       = typesv1.ErrorReason_ERROR_REASON_CHAIN_BROKEN
	corrupt      = typesv1.ErrorReason_ERROR_REASON_SEGMENT_CORRUPT
	newerFormat  = typesv1.ErrorReason_ERROR_REASON_FORMAT_NEWER
	noContainer  = typesv1.ErrorReason_ERROR_REASON_STORAGE_CONTAINER_MISSING
	badConfig    = typesv1.ErrorReason_ERROR_REASON_STORAGE_CONFIG_INVALID
	credentials  = typesv1.ErrorReason_ERROR_REASON_STORAGE_CREDENTIALS
	permission   = typesv1.ErrorReason_ERROR_REASON_STORAGE_PERMISSION
)

// site is an account with everything in it: web (open), db (closed by a failover), old (its protection ended), a second
// lineage of web that ended, and a machine that the catalogue does not know.
func site(t *testing.T) (a *account, web, db *lineage) {
	a = newAccount(t)
	web = a.protect(1, 1, "lab", "web-01")
	web.catalogued(time.Time{})
	db = a.protect(2, 2, "lab", "db 01")
	db.catalogued(time.Time{})
	_, err := db.r.CloseLineage(testkit.Context(t), replica.FenceOptions{Failover: "f-1"})
	require.NoError(t, err)
	before := a.protect(3, 1, "lab", "web-01")
	before.catalogued(time.Date(2026, 11, 22, 9, 30, 0, 0, time.UTC))
	_, err = before.r.CloseLineage(testkit.Context(t), replica.FenceOptions{Failover: "disable-" + string(before.id)})
	require.NoError(t, err)
	a.protect(4, 4, "branch", "stranger")
	a.policy()
	a.plan("everything", 0, []string{"sites/lab/vms/db 01"}, []string{"sites/lab/vms/" + guid(1), "sites/branch/vms/stranger"})
	require.NoError(t, web.r.Pin(testkit.Context(t), replica.Pin{Seq: 3, Owner: "hold/audit"}))
	return a, web, db
}

// What a store holds, in every format, and what a person did wrong.
func TestLists(t *testing.T) {
	a, _, _ := site(t)
	text := a.transcript(a.ok()) + a.transcript(a.ok("--vm", "web-01")) + a.transcript(a.ok("--vm", "sites/lab/vms/"+guid(2))) +
		a.transcript(a.ok("--lineage", string(lineageID(3)))) + a.transcript(a.ok("-o", "yaml")) + a.transcript(a.ok("--vm", "STRANGER", "-o", "yaml"))
	golden(t, "lists.golden", text)
	for _, args := range [][]string{{}, {"--vm", "web-01"}} {
		var fromJSON, fromYAML any
		require.NoError(t, json.Unmarshal([]byte(a.ok(append(args, "-o", "json")...).out), &fromJSON))
		require.NoError(t, yaml.Unmarshal([]byte(a.ok(append(args, "-o", "yaml")...).out), &fromYAML))
	}
}

func TestRefusals(t *testing.T) {
	a, web, _ := site(t)
	a.protect(5, 5, "branch", "db 01").catalogued(time.Time{})
	_, err := replica.Create(testkit.Context(t), a.store, lineageID(6)) // nothing was ever sent
	require.NoError(t, err)
	occupied := filepath.Join(a.root, "occupied")
	require.NoError(t, os.Mkdir(occupied, 0o750))
	require.NoError(t, os.WriteFile(filepath.Join(occupied, "mine.txt"), nil, 0o600))
	out := filepath.Join(a.root, "out")
	text := a.refused(vmNotFound, "--vm", "nobody")
	text += a.refused(vmNotFound, "--vm", "web-01", "--lineage", string(lineageID(2)))
	text += a.refused(invalid, "--vm", "db 01")
	text += a.refused(invalid, "--lineage", "no-lineage")
	text += a.refused(noPoint, "--vm", "web-01", "--point", "99", "--out", out)
	text += a.refused(noPoint, "--lineage", string(lineageID(6)), "--out", out)
	text += a.refused(notEmpty, "--vm", "web-01", "--out", occupied)
	text += a.refused(unwritable, "--vm", "web-01", "--out", filepath.Join(out, "deeper", "still"))
	text += a.refused(noPlan, "--plan", "nothing", "--out", out)
	text += a.refused(invalid, "--vm", "web-01", "--out", out, "--take-over")
	text += a.refused(invalid, "--vm", "web-01", "--out", out, "--take-over", "--yes", "--failover", "disable-x")
	text += a.refused(closedReason, "--vm", "sites/lab/vms/"+guid(2), "--out", out, "--take-over", "--yes")
	text += a.refused(closedReason, "--vm", "web-01", "--lineage", string(lineageID(3)), "--out", out, "--take-over", "--yes")
	for _, args := range [][]string{
		{"--out", out}, {"--vm", "web-01", "--point", "3"}, {"--vm", "web-01", "--point", "yesterday", "--out", out}, {"--plan", "everything"},
		{"--plan", "everything", "--vm", "web-01", "--out", out}, {"--plan", "everything", "--point", "3", "--out", out}, {"--vm", "web-01", "--take-over"},
		{"--vm", "web-01", "--out", out, "--failover", "f-1"}, {"--vm", "web-01", "--out", out, "--cpus", "3"}, {"--vm", "web-01", "--out", out, "--parallel", "0"},
	} {
		r := a.run(args...)
		require.Equal(t, 2, r.code, "%v", args)
		r.err, _, _ = strings.Cut(r.err, "\n")
		r.err += "\n"
		text += a.transcript(r)
	}
	require.NoDirExists(t, out)
	for _, r := range []*lineage{web} {
		st, err := r.r.Refresh(testkit.Context(t))
		require.NoError(t, err)
		require.False(t, st.Closed(), "what was refused closed nothing")
	}
	elsewhere := *a
	elsewhere.dir = filepath.Join(a.root, "nowhere")
	text += elsewhere.refused(badConfig)
	require.NoDirExists(t, elsewhere.dir)
	require.NoError(t, os.Mkdir(elsewhere.dir, 0o750))
	text += elsewhere.refused(noContainer)
	text += newAccount(t).refused(noContainer)
	golden(t, "refusals.golden", text)
}

// What is damaged in storage is told apart, and hides nothing else.
func TestDamage(t *testing.T) {
	a, web, _ := site(t)
	out := func(n string) string { return filepath.Join(a.root, n) }
	journal := func(l replica.Lineage) string { return l.JournalContainer() }

	// A damaged catalogue stops nothing.
	a.put(catalogue.Container, catalogue.VMName("lab", guid(1), string(web.id)), "{")
	a.put(catalogue.Container, catalogue.VMName("lab", guid(2), string(lineageID(2))), `{"v":7}`)
	r := a.ok("--vm", "web-01", "--out", out("web"))
	web.requireCopy(out("web"), 4)
	text := a.transcript(a.ok()) + a.transcript(r)

	// A segment with a flipped bit: the point that needs it cannot be had, the one before can.
	var name string
	m, err := web.r.Find(testkit.Context(t), 4)
	require.NoError(t, err)
	for _, d := range m.Disks {
		for _, s := range d.Segments {
			name = s.Name
		}
	}
	a.flip(journal(web.id), name)
	text += a.refused(corrupt, "--vm", "web-01", "--out", out("flipped"))
	a.ok("--vm", "web-01", "--point", "3", "--out", out("before"))
	web.requireCopy(out("before"), 3)
	require.NoError(t, a.store.Container(journal(web.id)).Delete(testkit.Context(t), name, blobstore.Conditions{}))
	text += a.refused(corrupt, "--vm", "web-01", "--out", out("missing"))
	require.NoFileExists(t, filepath.Join(out("missing"), "vm.json"))

	// A gap in the chain, a newer format, a container that is gone.
	require.NoError(t, a.store.Container(journal(lineageID(2))).Delete(testkit.Context(t), "log/000000000002.json", blobstore.Conditions{}))
	text += a.refused(broken, "--lineage", string(lineageID(2)), "--out", out("gap"))
	a.put(journal(lineageID(4)), "log/000000000005.json", `{"v":9}`)
	require.NoError(t, a.store.Container(journal(web.id)).Delete(testkit.Context(t), "log/000000000003.json", blobstore.Conditions{}))
	text += a.refused(broken, "--vm", "web-01", "--lineage", string(web.id), "--out", out("latest"))
	text += a.refused(broken, "--vm", "web-01", "--lineage", string(web.id), "--take-over", "--yes", "--point", "2", "--out", out("close"))
	a.ok("--vm", "web-01", "--lineage", string(web.id), "--point", "2", "--out", out("below"))
	web.requireCopy(out("below"), 2)
	text += a.refused(newerFormat, "--lineage", string(lineageID(4)), "--out", out("newer"))
	gone := catalogue.Record{VM: &catalogue.VM{Site: "lab", ID: guid(9), DisplayName: "gone", Lineage: string(lineageID(9))}}
	a.record(&gone)
	text += a.refused(noContainer, "--vm", "gone", "--out", out("gone"))
	text += a.transcript(a.ok())
	a.put(catalogue.Container, catalogue.PlanName("everything"), `{"v":2}`)
	text += a.refused(newerFormat, "--plan", "everything", "--out", out("plan"))
	a.put(catalogue.Container, catalogue.PlanName("everything"), `no`)
	text += a.refused(badPlan, "--plan", "everything", "--out", out("plan"))
	golden(t, "damage.golden", text)
}

// flip changes one bit in the middle of an object.
func (a *account) flip(container, name string) {
	a.t.Helper()
	rc, props, err := a.store.Container(container).Get(testkit.Context(a.t), name, 0, -1)
	require.NoError(a.t, err)
	raw := make([]byte, props.Size)
	for n := 0; n < len(raw); {
		m, err := rc.Read(raw[n:])
		n += m
		if n < len(raw) {
			require.NoError(a.t, err)
		}
	}
	require.NoError(a.t, rc.Close())
	raw[len(raw)/2] ^= 4
	a.put(container, name, string(raw))
}

// Every point comes back as it was, by every way to name it, also of lineages that are closed, ended or unknown to the
// catalogue; and nothing is written to the store.
func TestEveryPoint(t *testing.T) {
	a, web, db := site(t)
	readOnly := blobstoretest.Restrict(a.store, replica.Rights(replica.RoleRecover))
	s := a.session(readOnly)
	recover := func(vm, lineage string, selector *failoverv1.PointSelector) (*recovery.Result, string) {
		t.Helper()
		p, _, err := s.Find(t.Context(), vm, lineage)
		require.NoError(t, err)
		folder := filepath.Join(t.TempDir(), "copy")
		res, err := s.Recover(t.Context(), recovery.Request{Of: p, Point: selector, Dir: folder, Target: failoverv1.TargetKind_TARGET_KIND_VHD}, nil)
		require.NoError(t, err)
		return res, folder
	}
	for point := range web.points {
		res, folder := recover("web-01", "", &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_Ordinal{Ordinal: point}})
		require.Equal(t, point, res.Point)
		web.requireCopy(folder, point)
	}
	for want, selector := range map[uint64]*failoverv1.PointSelector{
		4: {Selector: &failoverv1.PointSelector_Latest{Latest: true}},
		2: {Selector: &failoverv1.PointSelector_LatestProcessed{LatestProcessed: true}},
		3: {Selector: &failoverv1.PointSelector_LatestApp{LatestApp: true}},
	} {
		res, folder := recover("web-01", "", selector)
		require.Equal(t, want, res.Point)
		web.requireCopy(folder, want)
	}
	latest := &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_Latest{Latest: true}}
	_, folder := recover("DB 01", "", latest)
	db.requireCopy(folder, 4)
	res, _ := recover("stranger", "", latest)
	require.Equal(t, "sites/branch/vms/"+guid(4), res.VM)
	res, _ = recover("web-01", string(lineageID(3)), latest)
	require.Equal(t, string(lineageID(3)), res.Lineage)

	// Without rights to write nothing can be taken over, and that is said.
	p, _, err := s.Find(t.Context(), "web-01", "")
	require.NoError(t, err)
	req := recovery.Request{Of: p, Point: latest, Dir: filepath.Join(t.TempDir(), "x"), Target: failoverv1.TargetKind_TARGET_KIND_VHD, TakeOver: true, Failover: "recover-x"}
	_, err = s.Recover(t.Context(), req, nil)
	require.True(t, errcat.Is(err, permission), "%v", err)
	require.NoDirExists(t, req.Dir)
	taking := a.session(blobstoretest.Restrict(a.store, replica.Rights(replica.RoleTakeOver)))
	_, err = taking.Recover(t.Context(), req, nil)
	require.NoError(t, err)
}

// Taking over fences the source for good, once, and goes on where it was interrupted.
func TestTakeOver(t *testing.T) {
	a, web, _ := site(t)
	out := filepath.Join(a.root, "out")
	r := a.ok("--vm", "web-01", "--out", out, "--take-over", "--check")
	require.Contains(t, r.err, "nothing stands against it")
	require.NoDirExists(t, out)
	web.write("os", 0, 4096, 77)
	web.commit(replica.KindPoint, replica.ConsistencyCrash, "os") // the source still runs

	r = a.ok("--vm", "web-01", "--out", out, "--take-over", "--yes", "-o", "json")
	id := newID.FindString(r.err)
	require.NotEmpty(t, id, r.err)
	require.Contains(t, r.err, "warning: the old machine may still run")
	var res recovery.Result
	require.NoError(t, json.Unmarshal([]byte(r.out), &res))
	require.Equal(t, id, res.Recovery)
	web.requireCopy(out, 5)
	require.ErrorIs(t, web.try(replica.KindPoint, replica.ConsistencyCrash, "os"), replica.ErrClosed)

	again := a.ok("--vm", "web-01", "--out", out, "--take-over", "--yes", "--failover", id)
	golden(t, "take-over.golden", strings.ReplaceAll(a.transcript(again), id, "<id>")+a.transcript(a.ok("--vm", "web-01", "--out", filepath.Join(a.root, "copy"))))
	st, err := web.r.Refresh(t.Context())
	require.NoError(t, err)
	closed, opened := st.FenceSeqs(id)
	require.Equal(t, replica.Seq(res.CloseSequence), closed)
	require.Zero(t, opened)
	require.Equal(t, closed, st.Head, "nothing else was written")
	other := a.run("--vm", "web-01", "--out", filepath.Join(a.root, "other"), "--take-over", "--yes")
	require.Equal(t, 1, other.code)
	require.Contains(t, other.err, "--failover "+id)
}

// A recovery that is killed at any place is finished by the same command.
func TestInterrupted(t *testing.T) {
	for _, at := range []string{"recover/before-close", "recover/after-close", "recover/after-claim", "recover/before-describe"} {
		t.Run(strings.ReplaceAll(at, "/", " "), func(t *testing.T) {
			a := newAccount(t)
			web := a.protect(1, 1, "lab", "web-01")
			out := filepath.Join(a.root, "out")
			args := []string{"--vm", "web-01", "--out", out, "--take-over", "--yes", "--failover", "recover-mine"}
			t.Setenv("LANDFALL_FAILPOINTS", at+"=error")
			r := a.run(args...)
			require.Equal(t, 1, r.code, r.out)
			require.NoFileExists(t, filepath.Join(out, "vm.json"))
			t.Setenv("LANDFALL_FAILPOINTS", "")
			a.ok(args...)
			web.requireCopy(out, 4)
			require.Contains(t, a.ok(args...).out, "it was complete")
		})
	}
}

// A folder in which a recovery was begun goes on with its point although newer ones came, unless another is asked for.
func TestBegunFolderKeepsItsPoint(t *testing.T) {
	a := newAccount(t)
	web := a.protect(1, 1, "lab", "web-01")
	out := filepath.Join(a.root, "out")
	t.Setenv("LANDFALL_FAILPOINTS", "recover/before-describe=error")
	require.Equal(t, 1, a.run("--vm", "web-01", "--out", out).code)
	t.Setenv("LANDFALL_FAILPOINTS", "")
	web.write("os", 0, 4096, 77)
	web.commit(replica.KindPoint, replica.ConsistencyCrash, "os")
	a.refused(notEmpty, "--vm", "web-01", "--out", out, "--point", "5")
	a.ok("--vm", "web-01", "--out", out)
	web.requireCopy(out, 4)
	a.ok("--vm", "web-01", "--out", out)
	web.requireCopy(out, 4)
	a.refused(notEmpty, "--vm", "web-01", "--out", out, "--take-over", "--yes")
}

// Credentials that are refused are named as such, and a store that may not be listed is read by its catalogue.
func TestRights(t *testing.T) {
	a, web, _ := site(t)
	denied := a.session(failing{a.store, blobstore.ErrCredentials})
	_, err := denied.Survey(t.Context(), nil)
	require.True(t, errcat.Is(err, credentials), "%v", err)

	noList := blobstore.Grants{{Containers: "lf", Actions: blobstore.Read}}
	s := a.session(blobstoretest.Restrict(a.store, noList))
	survey, err := s.Survey(t.Context(), nil)
	require.NoError(t, err)
	require.Len(t, survey.Protections, 3)
	require.Contains(t, strings.Join(survey.Warnings, " "), "may not list containers")
	p, _, err := s.Find(t.Context(), "web-01", "")
	require.NoError(t, err)
	require.Equal(t, string(web.id), p.Lineage)

	nothing := a.session(blobstoretest.Restrict(a.store, nil))
	_, err = nothing.Survey(t.Context(), nil)
	require.True(t, errcat.Is(err, permission), "%v", err)
}

// failing answers everything that this test asks with one error.
type failing struct {
	blobstore.Store
	err error
}

func (f failing) Container(name string) blobstore.Container {
	return blobstoretest.NewFaulty(f.Store, func(blobstoretest.Op, string, string) blobstoretest.Fault { return blobstoretest.Before }).Container(name)
}

func (f failing) ListContainers(context.Context, string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) { yield("", f.err) }
}

// A plan brings its machines up in order, those of a group together, and is followed again to its end.
func TestPlan(t *testing.T) {
	a, web, db := site(t)
	out := filepath.Join(a.root, "out")
	a.ok("--plan", "everything", "--out", out, "--check")
	require.NoDirExists(t, out)
	text := a.refused(closedReason, "--plan", "everything", "--out", out, "--take-over", "--yes")
	st, err := web.r.Refresh(t.Context())
	require.NoError(t, err)
	require.False(t, st.Closed(), "one that cannot be taken over stops the plan before anything is closed")
	r := a.ok("--plan", "recoveryPlans/everything", "--out", out)
	web.requireCopy(filepath.Join(out, "web-01"), 4)
	db.requireCopy(filepath.Join(out, guid(2)), 4)
	require.FileExists(t, filepath.Join(out, "stranger", "vm.json"))
	text += sorted(a.transcript(r)) + sorted(a.transcript(a.ok("--plan", "everything", "--out", out, "-o", "yaml")))

	// A machine that fails stops later groups, not its own; repeating the command ends it.
	again := filepath.Join(a.root, "again")
	require.NoError(t, os.MkdirAll(filepath.Join(again, guid(2)), 0o750))
	r = a.run("--plan", "everything", "--out", again)
	require.Equal(t, 0, r.code, "an empty folder is as good as none")
	third := filepath.Join(a.root, "third")
	require.NoError(t, os.MkdirAll(filepath.Join(third, "stranger"), 0o750))
	mine := filepath.Join(third, "stranger", "mine")
	require.NoError(t, os.WriteFile(mine, nil, 0o600))
	text += a.refused(notEmpty, "--plan", "everything", "--out", third)
	require.NoDirExists(t, filepath.Join(third, "web-01"), "it is found before anything is made")
	t.Setenv("LANDFALL_FAILPOINTS", "recover/before-describe=error")
	require.NoError(t, os.Remove(mine))
	r = a.run("--plan", "everything", "--out", third)
	require.Equal(t, 1, r.code)
	require.Contains(t, r.out, "not begun")
	t.Setenv("LANDFALL_FAILPOINTS", "")
	a.ok("--plan", "everything", "--out", third)
	web.requireCopy(filepath.Join(third, "web-01"), 4)

	a.plan("odd", 0, []string{"sites/lab/vms/nobody", "sites/lab/vms/web-01"}, []string{"sites/lab/vms/" + guid(1)})
	text += a.refused(vmNotFound, "--plan", "odd", "--out", filepath.Join(a.root, "odd"))
	golden(t, "plan.golden", text)
}

// Closing all lineages comes before the first copy, in one name; groups wait.
func TestPlanTakesOver(t *testing.T) {
	a := newAccount(t)
	one, two := a.protect(1, 1, "lab", "one"), a.protect(2, 2, "lab", "two")
	a.plan("both", 50*time.Millisecond, []string{"sites/lab/vms/one"}, []string{"sites/lab/vms/two"})
	r := a.ok("--plan", "both", "--out", filepath.Join(a.root, "out"), "--take-over", "--yes")
	id := newID.FindString(r.err)
	require.Regexp(t, `(?s)close-lineage.*close-lineage.*one +materialise-disks.*waiting 50ms.*two +materialise-disks`, r.err)
	for _, l := range []*lineage{one, two} {
		st, err := l.r.Refresh(t.Context())
		require.NoError(t, err)
		require.Equal(t, id, st.Fence.Failover)
		l.requireCopy(filepath.Join(a.root, "out", l.machine.DisplayName), 4)
	}
}

// sorted puts the lines of machines that came up together in an order.
func sorted(s string) string {
	lines := strings.SplitAfter(s, "\n")
	for i := range lines {
		for j := i + 1; j < len(lines); j++ {
			if strings.Contains(lines[i], "materialise-disks") && strings.Contains(lines[j], "materialise-disks") && lines[j] < lines[i] {
				lines[i], lines[j] = lines[j], lines[i]
			}
		}
	}
	return strings.Join(lines, "")
}
