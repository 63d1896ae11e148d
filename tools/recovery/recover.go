package recovery

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	failoverorchestrator "github.com/landfall-dr/landfall/services/failover-orchestrator"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/vhdtarget"
)

// Failpoints, in the order of a recovery.
var (
	fpBeforeClose  = failpoint.Register("recover/before-close")
	fpAfterClose   = failpoint.Register("recover/after-close")
	fpAfterClaim   = failpoint.Register("recover/after-claim")
	fpBeforeFinish = failpoint.Register("recover/before-describe")
)

// Request is one machine to bring back.
type Request struct {
	// Of is the lineage, from Find.
	Of *Protection
	// Point selects the point; Explicit says that it was named by its number, so that a folder with another one is refused.
	Point *failoverv1.PointSelector
	// Dir is the folder, absolute.
	Dir string
	// Target is the kind of copy, Qemu its settings.
	Target failoverv1.TargetKind
	Qemu   *failoverv1.QemuTarget
	// TakeOver closes the lineage first, in the name of Failover (NewFailover).
	TakeOver bool
	Failover string
	// Check stops before anything is made or closed.
	Check bool
}

// Steps of a recovery, as progress names them.
const (
	StepClose       = "close-lineage"
	StepMaterialise = "materialise-disks"
	StepBoot        = "boot-machine"
)

// Update is progress of one machine.
type Update struct {
	// VM is the machine's title.
	VM string
	// Step that begins, goes on or has ended; Detail is one line about it.
	Step, Detail string
	// Done and Total are bytes of the disks, Sent what was written. Total is 0 outside of materialise-disks.
	Done, Total, Sent int64
	// Ended says that the step is done.
	Ended bool
}

// Result is what a recovery made.
type Result struct {
	VM          string `json:"vm"`
	DisplayName string `json:"display_name"`
	Lineage     string `json:"lineage"`
	// Recovery is the id in the folder's marker: of the failover when it took over.
	Recovery    string    `json:"recovery"`
	Point       uint64    `json:"point"`
	CutTime     time.Time `json:"cut_time"`
	Consistency string    `json:"consistency"`
	Folder      string    `json:"folder"`
	Files       []string  `json:"files"`
	// Bytes written; 0 when the folder was complete before.
	Bytes int64 `json:"bytes"`
	// CloseSequence is the manifest of the close; 0 when nothing was closed.
	CloseSequence uint64 `json:"close_sequence"`
	// Complete says that the folder was complete before: it is as it was made then.
	Complete bool `json:"complete_before"`
	// Proof is how a booted machine showed that it is up; "" for one that does not boot.
	Proof string `json:"proof"`
	// Seconds from the machine's start to that proof.
	Seconds float64 `json:"seconds"`
	Console string  `json:"console"`
}

// failoverPattern is an id that manifests, markers and folders all take.
var failoverPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,79}$`)

// NewFailover is the id of a take-over; given is the one to go on with, or "" for a new one.
func NewFailover(given string) (string, error) {
	switch {
	case given == "":
		return "recover-" + uuid.NewString(), nil
	case !failoverPattern.MatchString(given), strings.HasPrefix(given, endFence), strings.HasPrefix(given, copyPrefix):
		return "", errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "--failover %q: want 1 to 80 of a-z, 0-9 and hyphens, as it was printed", given)
	}
	return given, nil
}

// copyPrefix begins the id of a recovery that took nothing over: the lineage and the point follow.
const copyPrefix = "copy-"

func copyID(l replica.Lineage, o replica.Ordinal) string {
	return fmt.Sprintf("%s%s-%d", copyPrefix, l, o)
}

// copyOf is the point of the id of a recovery of a lineage.
func copyOf(id string, l replica.Lineage) (replica.Ordinal, bool) {
	rest, ok := strings.CutPrefix(id, copyPrefix+string(l)+"-")
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(rest, 10, 63)
	return replica.Ordinal(n), err == nil && n > 0
}

// Recover brings one machine back: [close], choose the point, check the folder, claim it, write the disks, describe the
// machine, [boot]. Repeating it with the same request goes on where it was interrupted. say, when set, hears how far it is,
// from any goroutine.
func (s *Session) Recover(ctx context.Context, req Request, say func(Update)) (*Result, error) {
	r, t, err := s.prepare(ctx, req)
	if err != nil {
		return nil, err
	}
	w := &work{s: s, r: r, t: t, req: req, say: say, out: &Result{
		VM: req.Of.VM, DisplayName: req.Of.DisplayName, Lineage: req.Of.Lineage, Folder: req.Dir, Files: []string{}}}
	if say == nil {
		w.say = func(Update) {}
	}
	if err := w.check(ctx); err != nil || req.Check {
		return w.out, err
	}
	if req.TakeOver {
		seq, err := s.Close(ctx, req.Of, req.Failover)
		if err != nil {
			return nil, err
		}
		w.out.CloseSequence = seq
		w.say(Update{VM: req.Of.Title(), Step: StepClose, Detail: fmt.Sprintf("manifest %d: nothing that the source sends counts any more", seq), Ended: true})
		if err := w.check(ctx); err != nil { // a point may have come in before the close
			return nil, err
		}
	}
	return w.out, w.make(ctx)
}

func (s *Session) prepare(ctx context.Context, req Request) (*replica.Replica, target.Target, error) {
	t, ok := s.targets[req.Target]
	if !ok {
		return nil, nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_UNSUPPORTED, "this version cannot recover to %s", req.Target)
	}
	if !filepath.IsAbs(req.Dir) {
		return nil, nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "target folder %q is not an absolute path", req.Dir)
	}
	lineage := replica.Lineage(req.Of.Lineage)
	r, damage, err := replica.OpenDamaged(ctx, s.store, lineage)
	if err != nil || damage == nil {
		return r, t, s.chainError(ctx, lineage, err, "read the chain of %s", req.Of.Title())
	}
	// What is below the damage can be recovered, by its number: it is not the latest. It cannot be closed.
	points, err := r.Points(ctx)
	switch {
	case err != nil:
		return nil, nil, s.chainError(ctx, lineage, err, "list the points of %s", req.Of.Title())
	case len(points) == 0 || req.TakeOver:
		return nil, nil, s.chainError(ctx, lineage, damage, "read the chain of %s", req.Of.Title())
	case req.Point.GetOrdinal() == 0:
		newest := points[len(points)-1]
		return nil, nil, s.chainError(ctx, lineage, damage, "which point of %s is the newest cannot be said; the newest that can be read is %d of %s, to be had by `--point %d`",
			req.Of.Title(), newest.Ordinal, newest.CutTime.UTC().Format(time.DateTime), newest.Ordinal)
	}
	return r, t, nil
}

// Close fences a lineage in the name of a failover, and returns the manifest. Idempotent by failover.
func (s *Session) Close(ctx context.Context, p *Protection, failover string) (uint64, error) {
	lineage := replica.Lineage(p.Lineage)
	r, err := replica.Open(ctx, s.store, lineage)
	if err != nil {
		return 0, s.chainError(ctx, lineage, err, "read the chain of %s", p.Title())
	}
	if err := failpoint.Hit(fpBeforeClose); err != nil {
		return 0, err
	}
	res, err := r.CloseLineage(ctx, replica.FenceOptions{Failover: failover, Host: s.o.Host, Reason: "recovery from storage"})
	switch {
	case errors.Is(err, replica.ErrClosed):
		state, rerr := r.Refresh(ctx)
		if rerr != nil {
			return 0, s.chainError(ctx, lineage, rerr, "read the chain of %s", p.Title())
		}
		return 0, closedBy(p, state.Fence.Failover)
	case errors.Is(err, replica.ErrReopened):
		return 0, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_LINEAGE_CLOSED, err, "failover %s is over: take over without --failover, for a new one", failover)
	case err != nil:
		return 0, s.chainError(ctx, lineage, err, "close the lineage of %s", p.Title())
	}
	return uint64(res.Seq), failpoint.Hit(fpAfterClose)
}

// closedBy refuses to take over what another failover holds.
func closedBy(p *Protection, failover string) error {
	how := fmt.Sprintf("go on with that one by --failover %s, or recover without --take-over", failover)
	if strings.HasPrefix(failover, endFence) {
		how = "recover without --take-over"
	}
	return errcat.New(typesv1.ErrorReason_ERROR_REASON_LINEAGE_CLOSED, "lineage %s of %s is closed by %s already, so its source cannot commit: %s",
		p.Lineage, p.Title(), failover, how).With("failover", failover)
}

// work is one recovery.
type work struct {
	s   *Session
	r   *replica.Replica
	t   target.Target
	req Request
	say func(Update)
	out *Result

	m       *replica.Manifest
	machine *typesv1.Machine
	id      string
	existed bool
}

func (w *work) plan() target.Plan {
	return target.Plan{Failover: w.id, Dir: filepath.Clean(w.req.Dir), Machine: w.machine, Qemu: w.req.Qemu}
}

// explicit says that the point was named by its number.
func (w *work) explicit() bool {
	_, ok := w.req.Point.GetSelector().(*failoverv1.PointSelector_Ordinal)
	return ok
}

// check chooses the point and finds out whether the folder can be used. A folder in which a recovery of this lineage was
// begun goes on with its point, unless another one was named.
func (w *work) check(ctx context.Context) error {
	lineage := w.r.Lineage()
	points, err := w.r.Points(ctx)
	if err != nil {
		return w.s.chainError(ctx, lineage, err, "list the points of %s", w.req.Of.Title())
	}
	state, err := w.r.Refresh(ctx)
	if err != nil {
		return w.s.chainError(ctx, lineage, err, "read the chain of %s", w.req.Of.Title())
	}
	if w.req.TakeOver && state.Closed() && state.Fence.Failover != w.req.Failover {
		return closedBy(w.req.Of, state.Fence.Failover)
	}
	chosen, err := failoverorchestrator.ChoosePoint(points, w.req.Point)
	if err != nil {
		return err
	}
	ordinal := chosen.Ordinal
	w.id = w.req.Failover
	if !w.req.TakeOver {
		w.id = copyID(lineage, ordinal)
		owner, err := w.t.Owner(target.Plan{Dir: filepath.Clean(w.req.Dir)})
		if err != nil {
			return err
		}
		if begun, ok := copyOf(owner, lineage); ok && !w.explicit() {
			ordinal, w.id = begun, owner
		}
	}
	if w.m, err = w.r.Find(ctx, ordinal); err != nil {
		return w.s.chainError(ctx, lineage, err, "find point %d of %s", ordinal, w.req.Of.Title())
	}
	present := &typesv1.Machine{Name: w.req.Of.VM, Id: w.req.Of.ID(), DisplayName: w.req.Of.DisplayName, Host: w.req.Of.Host}
	if w.machine, err = failoverorchestrator.MachineAt(ctx, w.r, w.m, present); err != nil {
		return err
	}
	if w.existed, err = w.t.Check(ctx, w.plan()); err != nil {
		return err
	}
	w.out.Recovery, w.out.Point, w.out.CutTime, w.out.Consistency = w.id, uint64(w.m.Point), w.m.CutTime.UTC(), string(w.m.Consistency)
	return nil
}

// complete says whether the folder holds the whole copy: vm.json is written last. One of another point is refused.
func (w *work) complete() (bool, error) {
	raw, err := os.ReadFile(filepath.Join(w.req.Dir, vhdtarget.MachineFile))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	var have struct {
		Failover, Lineage string
		Point             uint64
	}
	if err == nil {
		err = json.Unmarshal(raw, &have)
	}
	switch {
	case err != nil:
		return false, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "read what %s holds", w.req.Dir)
	case have.Failover != "failovers/"+w.id || have.Lineage != string(w.r.Lineage()) || have.Point != uint64(w.m.Point):
		return false, errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_NOT_EMPTY, "target folder %s holds point %d of lineage %s already", w.req.Dir, have.Point, have.Lineage).With("folder", w.req.Dir)
	}
	return true, nil
}

// make makes the copy.
func (w *work) make(ctx context.Context) error {
	title := w.req.Of.Title()
	files, err := w.t.Claim(ctx, w.plan(), w.existed)
	if err != nil {
		return err
	}
	w.out.Files = files
	if err := failpoint.Hit(fpAfterClaim); err != nil {
		return err
	}
	if w.out.Complete, err = w.complete(); err != nil {
		return err
	}
	if w.out.Complete {
		w.say(Update{VM: title, Step: StepMaterialise, Detail: fmt.Sprintf("%s holds point %d already", w.req.Dir, w.m.Point), Ended: true})
	} else if err := w.materialise(ctx); err != nil {
		return err
	}
	if !w.t.Boots() {
		return nil
	}
	w.say(Update{VM: title, Step: StepBoot})
	evidence, err := w.t.Boot(ctx, w.plan(), func(line string) { w.say(Update{VM: title, Step: StepBoot, Detail: line}) })
	if evidence != nil {
		w.out.Proof, w.out.Seconds, w.out.Console = evidence.GetProof(), evidence.GetSeconds(), evidence.GetConsoleFile()
	}
	if err != nil {
		return err
	}
	w.say(Update{VM: title, Step: StepBoot, Detail: fmt.Sprintf("%s after %.1f s", w.out.Proof, w.out.Seconds), Ended: true})
	return nil
}

func (w *work) materialise(ctx context.Context) (err error) {
	sink, err := w.t.Sink(ctx, w.plan())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sink.Close()) }()
	counted := newCounter(sink, w.m, w.s.o.Now, func(u Update) {
		u.VM, u.Step = w.req.Of.Title(), StepMaterialise
		w.say(u)
	})
	m, err := w.r.Materialise(ctx, w.m.Point, counted, replica.MaterialiseOptions{Parallel: w.s.o.Ranges})
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return failoverorchestrator.PointError(err, "write the disks of point %d of %s", w.m.Point, w.req.Of.Title())
	}
	w.out.Bytes = m.Bytes
	if err := failpoint.Hit(fpBeforeFinish); err != nil {
		return err
	}
	raw, err := failoverorchestrator.DescribeCopy(w.t, w.id, w.r.Lineage(), w.m, w.machine)
	if err != nil {
		return err
	}
	if err := w.t.Describe(ctx, w.plan(), raw); err != nil {
		return err
	}
	w.say(Update{VM: w.req.Of.Title(), Step: StepMaterialise, Detail: fmt.Sprintf("point %d of %s, %s-consistent: %d disks, %d bytes written",
		w.m.Point, w.m.CutTime.UTC().Format(time.RFC3339), w.m.Consistency, len(m.Disks), m.Bytes), Ended: true})
	return nil
}
