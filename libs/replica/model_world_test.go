package replica

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
)

// planted is what a run breaks on purpose: in this package, or at the modelled host.
type planted struct {
	bugs
	host hostBugs
}

// world is one run: everything in it is touched by one goroutine at a time, the scheduler's or that of the one
// actor it let go.
type world struct {
	rng     *rand.Rand
	bugs    planted
	mem     *blobstoretest.Memory
	clock   time.Time
	host    *modelHost
	rec     record
	planned *plannedFailover
	wire    []func() // calls to the host that come late or twice
	tasks   []*modelTask
	actors  []*actor
	events  chan event
	late    []func() // effects of storage calls still on the wire
	touched map[string]bool
	held    []held
	segs    map[string]content // every segment ever built, by name
	check   checker
	quiet   bool // the end: no faults, no choices
	awake   bool // just before: no faults, sleepers go on
	rates   rates
	turns   int
	failed  error // the first violation
	stats   *modelStats
	trace   maphash.Hash
}

// rates are drawn per seed, so that seeds differ in character.
type rates struct {
	fault, crash, late, abandon, write, hostCrash, doze, wire float64
	takeover                                                  bool
	meek                                                      bool // giving up a cycle does not raise the epoch: the other rules must do
	batch                                                     int64
	calm                                                      int // orchestrators close once in so many turns
	prelude                                                   int // points before the faults begin
	stop                                                      func(Entry) bool
	writeOnce                                                 time.Duration // of the journal; 0: none
	tiers                                                     modelTiers
}

// record is the scheduler's KV record: it survives the scheduler.
type record struct {
	epoch   Epoch
	open    Seq
	highest Ordinal
	cycle   *cycle
}

type stage int

const (
	cutting stage = iota // the host was asked, its answer is not known
	shipping
	abandoning // until the host has heard it
)

type cycle struct {
	ordinal Ordinal
	base    Ordinal
	stage   stage
	pass    bool
	fenced  bool // cut while the source was fenced
	k       uint32
	open    Seq
	tasks   []*modelTask
}

// modelTask is a ship task, kept for ever: any may be redelivered at any time.
type modelTask struct {
	id          string
	n           int
	kind        Kind
	epoch       Epoch
	open        Seq
	base, point Ordinal
	pass        *Pass
	compare     bool // the pass compares with the chain instead of sending all (rule 13)
}

// actor is one process. It runs one job at a time and stops at every store call.
type actor struct {
	name, role string
	w          *world
	store      *blobstoretest.Faulty
	r          *Replica // its memory: lost in a crash
	applier    *Applier
	grant      chan blobstoretest.Fault
	busy       bool // a job runs
	op         blobstoretest.Op
	blob       string // the call it stands at is about
	late       bool
	weight     int
	until      int // asleep until this turn
	slept      sleep
}

// sleep is what the world was when an actor fell asleep in the middle of a job.
type sleep struct {
	closes int
	floor  Seq
	head   Seq
	at     time.Time
}

type event struct {
	a    *actor
	done bool
	err  error
}

var modelActors = []string{"ship-1", "ship-2", "apply-1", "apply-2", "scheduler", "orch-1", "orch-2", "retain-1", "retain-2", "read-1"}

func newWorld(seed uint64, b planted, st *modelStats) *world {
	rng := rand.New(rand.NewPCG(seed, 77))
	w := &world{rng: rng, bugs: b, mem: blobstoretest.NewMemory(), clock: testTime, events: make(chan event),
		touched: map[string]bool{}, segs: map[string]content{}, stats: st, rec: record{epoch: 1}}
	w.trace.SetSeed(modelSeed)
	w.check.w = w
	pick := func(v ...float64) float64 { return v[rng.IntN(len(v))] }
	w.rates = rates{fault: pick(0, .01, .03, .08), crash: pick(0, .01, .03), late: pick(0, .01, .04), abandon: pick(.01, .05, .2),
		write: pick(.05, .15, .3), hostCrash: pick(0, .002, .005, .01), doze: pick(0, .003, .01), wire: pick(0, .05, .2),
		takeover: rng.IntN(2) == 0, batch: []int64{1, 64 << 10, 1 << 30}[rng.IntN(3)]}
	w.rates.calm = []int{10, 20, 100}[rng.IntN(3)]
	w.rates.meek = rng.IntN(4) == 0
	w.rates.prelude = []int{0, 0, 3, 6}[rng.IntN(4)]
	if w.rates.prelude > 0 && rng.IntN(2) == 0 { // a long life with few faults
		w.rates.fault, w.rates.crash, w.rates.late, w.rates.abandon, w.rates.calm = .005, .002, .005, .01, 300
	}
	if rng.IntN(2) == 0 {
		w.rates.stop = func(e Entry) bool { return e.Ordinal%3 == 0 }
	}
	w.drawRetention()
	w.host = newModelHost([]source{writeLog, writeLog, writeLog, frozen, bitmap}[rng.IntN(5)], rng, b.host, st.hit)
	st.hit([]string{"source: write log", "source: frozen ranges", "source: bitmap"}[w.host.kind])
	for _, n := range modelActors {
		a := &actor{name: n, role: strings.TrimRight(n, "-12"), w: w, grant: make(chan blobstoretest.Fault)}
		a.store = blobstoretest.NewFaulty(lateStore{w.mem, w, a}, a.hook)
		w.actors = append(w.actors, a)
	}
	if _, err := Create(context.Background(), w.mem, testLineage); err != nil {
		w.fail("create: %v", err)
	}
	for range 4 {
		w.host.write()
	}
	return w
}

var modelSeed = maphash.MakeSeed()

// modelTrace prints every store call, to look at one seed.
var modelTrace = os.Getenv("LANDFALL_MODEL_TRACE") != ""

func (w *world) fail(format string, a ...any) {
	if w.failed == nil {
		w.failed = fmt.Errorf(format, a...)
	}
}

func (w *world) hit(rule string) { w.stats.hit(rule) }

// hook stops the actor before each of its store calls until the world answers.
func (a *actor) hook(op blobstoretest.Op, _, name string) blobstoretest.Fault {
	a.op, a.blob = op, name
	a.w.events <- event{a: a}
	return <-a.grant
}

// wait runs the actor that was just let go until its next store call or the end of its job.
func (w *world) wait() {
	e := <-w.events
	if !e.done {
		return
	}
	a := e.a
	a.busy, a.until = false, 0
	if a.store.Crashed() {
		a.store.Revive()
		a.r, a.applier = nil, nil
	}
	if modelTrace {
		fmt.Printf("%d %s ends: %v\n", w.turns, a.name, e.err)
	}
	if e.err != nil {
		w.answered(a, e.err)
	}
}

// answered judges what a job failed with.
func (w *world) answered(a *actor, err error) {
	for _, r := range refusals {
		if errors.Is(err, r.err) {
			w.hit(r.rule)
		}
	}
	if errors.Is(err, ErrBusy) && w.others(a) {
		w.hit("R21 two appliers alive, one is busy")
	}
	switch {
	case errors.Is(err, ErrCorrupt), errors.Is(err, ErrInvalid):
		w.fail("%s: %v", a.name, err)
	case IsRefusal(err), errors.Is(err, ErrLeaseLost):
	case w.quiet && !w.awake && !errors.Is(err, blobstoretest.ErrInjected) && !errors.Is(err, blobstoretest.ErrCrashed):
		w.fail("%s, with no faults: %v", a.name, err)
	}
}

// others says whether another actor of the same role is in the middle of a job.
func (w *world) others(a *actor) bool {
	return slices.ContainsFunc(w.actors, func(b *actor) bool { return b != a && b.role == a.role && b.busy })
}

// job is what an actor does, with its memory of the chain.
type job func(ctx context.Context, r *Replica) error

// bury ends the jobs that a world leaves in their middle, a sleeper's when something is violated.
func (w *world) bury() {
	for _, a := range w.actors {
		for a.busy {
			a.store.Crash()
			a.grant <- 0
			w.wait()
		}
	}
}

// start gives an idle actor a job and runs it to its first store call.
func (w *world) start(a *actor, j job) {
	a.busy = true
	go func() {
		ctx := context.Background()
		err := func() (err error) {
			if a.r == nil {
				if a.r, err = open(ctx, a.store, testLineage, w.bugs.bugs); err != nil {
					a.r = nil
					return err
				}
				a.r.opens = 1 // one goroutine per actor
				w.hit("R9 read from storage after a crash")
			}
			return j(ctx, a.r)
		}()
		w.events <- event{a: a, done: true, err: err}
	}()
	w.wait()
}

// step lets one actor make one store call, with a fate.
func (w *world) step(a *actor) {
	w.stats.steps++
	_, _ = w.trace.WriteString(a.name + string(a.op))
	fate := blobstoretest.None
	if !w.quiet && !w.awake {
		switch x := w.rng.Float64(); {
		case x < w.rates.crash:
			fate = []blobstoretest.Fault{blobstoretest.Crash, blobstoretest.CrashAfter}[w.rng.IntN(2)]
			w.hit("fault: crash")
		case x < w.rates.crash+w.rates.fault:
			fate = []blobstoretest.Fault{blobstoretest.Before, blobstoretest.After}[w.rng.IntN(2)]
			w.hit("fault: error or lost answer")
		case x < w.rates.crash+w.rates.fault+w.rates.late && canBeLate(a.op):
			a.late = true
			w.hit("fault: late effect")
		}
	}
	if modelTrace {
		fmt.Printf("%d %s %s %s %v late=%t\n", w.turns, a.name, a.op, a.blob, fate, a.late)
	}
	a.grant <- fate
	w.wait()
	a.late = false
	w.check.all()
	if a.busy && !w.quiet && !w.awake && w.rng.Float64() < w.rates.doze {
		w.doze(a)
	}
}

// doze pauses an actor in the middle of its job, for minutes: leases end, failovers come and go, floors rise.
func (w *world) doze(a *actor) {
	a.until = w.turns + 40 + w.rng.IntN(400)
	w.advance(time.Duration(w.rng.IntN(180)) * time.Second)
	a.slept = sleep{closes: w.check.closes, floor: w.check.retired(), head: w.check.head, at: w.clock}
}

// wake says what an actor slept through.
func (w *world) wake(a *actor) {
	if a.until == 0 {
		return
	}
	a.until = 0
	s := a.slept
	w.hit("paused: " + a.role)
	if w.clock.Sub(s.at) > time.Minute && a.role == "apply" {
		w.hit("paused: applier whose lease ended")
	}
	if w.check.head > s.head+3 {
		w.hit("paused: " + a.role + " while the chain grew")
	}
	if w.check.closes > s.closes && !w.check.closed {
		w.hit("paused: a failover came and went")
	}
	if w.check.retired() > s.floor {
		w.hit("paused: " + a.role + " while something was retired")
	}
}

// advance moves storage time and, but for one time in four, the clocks of the processes.
func (w *world) advance(d time.Duration) {
	w.mem.Advance(d)
	if w.rng.IntN(4) > 0 {
		w.clock = w.clock.Add(d)
	}
}

// run is one interleaving.
func (w *world) run(steps int) error {
	defer w.bury()
	w.prelude()
	for w.turns = 1; w.turns <= steps && w.failed == nil; w.turns++ {
		if w.turns%40 == 1 { // some are fast, some all but asleep: a task is held for long
			w.weigh()
		}
		w.world()
		var total int
		for _, a := range w.actors {
			if a.until <= w.turns {
				total += a.weight
			}
		}
		if total == 0 {
			continue
		}
		n := w.rng.IntN(total)
		for _, a := range w.actors {
			if a.until > w.turns {
				continue
			}
			if n -= a.weight; n < 0 {
				w.wake(a)
				w.turn(a)
				break
			}
		}
	}
	w.end()
	return w.failed
}

func (w *world) weigh() {
	for _, a := range w.actors {
		a.weight = []int{0, 1, 5, 20}[w.rng.IntN(4)]
		if w.check.closed && a.role == "orch" { // a rewind makes many calls, and nobody else has work
			a.weight = []int{1, 20, 20, 40}[w.rng.IntN(4)]
		}
	}
}

// world moves what is not an actor: the guest, the host's power, the clock, requests on the wire.
func (w *world) world() {
	if w.rng.Float64() < w.rates.write {
		w.host.write()
	}
	if w.rng.IntN(8) == 0 {
		w.host.step()
	}
	if w.rng.Float64() < w.rates.hostCrash {
		w.host.crash(w.rng.IntN(2) == 0)
	}
	if w.rng.Float64() < .02 {
		w.advance(time.Duration(w.rng.IntN(70)) * time.Second)
	}
	if len(w.late) > 0 && w.rng.Float64() < .05 {
		w.deliver(w.rng.IntN(len(w.late)))
	}
	if len(w.wire) > 0 && w.rng.Float64() < .05 {
		w.reach(w.rng.IntN(len(w.wire)))
	}
}

func (w *world) deliver(i int) {
	f := w.late[i]
	w.late = append(w.late[:i], w.late[i+1:]...)
	f()
	w.check.all()
}

// reach lets a call to the host arrive.
func (w *world) reach(i int) {
	f := w.wire[i]
	w.wire = append(w.wire[:i], w.wire[i+1:]...)
	f()
}

// turn steps a busy actor, or gives an idle one work.
func (w *world) turn(a *actor) {
	if a.busy {
		w.step(a)
		return
	}
	switch a.role {
	case "scheduler":
		w.start(a, w.tick)
	case "orch":
		calm := w.rates.calm
		switch {
		case w.check.closed, w.planned != nil && w.planned.ready:
			calm = 2
		case len(w.check.points) < 3:
			calm *= 10
		}
		if w.rng.IntN(calm) == 0 {
			w.start(a, w.fence)
		}
	case "apply":
		w.start(a, a.applyJob())
	case "retain":
		if w.rng.IntN(3) == 0 {
			w.start(a, a.retainJob())
		}
	case "read":
		if w.rng.IntN(4) == 0 && len(w.check.points) > 0 {
			w.start(a, a.readJob())
		}
	default:
		if len(w.held) > 0 && w.rng.IntN(w.sleepy()) == 0 {
			w.start(a, a.heldJob())
		} else if t := w.anyTask(); t != nil {
			w.start(a, a.shipJob(t))
		}
	}
}

// sleepy: in one of so many turns somebody wakes who slept before his manifest; often while a pass is compared (rule 13).
func (w *world) sleepy() int {
	if c := w.rec.cycle; c != nil && len(c.tasks) > 0 && c.tasks[0].compare && !w.check.shipped[c.tasks[0].n] {
		return 2
	}
	return 12
}

// anyTask prefers what the open cycle still wants; others come again now and then.
func (w *world) anyTask() *modelTask {
	if len(w.tasks) == 0 {
		return nil
	}
	if c := w.rec.cycle; c != nil && len(c.tasks) > 0 && w.rng.IntN(5) > 0 {
		var left []*modelTask
		for _, t := range c.tasks {
			if !w.check.shipped[t.n] {
				left = append(left, t)
			}
		}
		if len(left) > 0 {
			return left[w.rng.IntN(len(left))]
		}
		if w.rng.IntN(8) > 0 {
			return nil
		}
	}
	n := len(w.tasks)
	if w.rng.IntN(3) > 0 {
		return w.tasks[n-1-w.rng.IntN(min(n, 3))]
	}
	return w.tasks[w.rng.IntN(n)]
}
