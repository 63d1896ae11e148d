package replica

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
)

// world is one run: everything in it is touched by one goroutine at a time, the scheduler's or that of the one
// actor it let go.
type world struct {
	rng     *rand.Rand
	bugs    bugs
	mem     *blobstoretest.Memory
	clock   time.Time
	host    *modelHost
	rec     record
	tasks   []*modelTask
	actors  []*actor
	events  chan event
	late    []func()
	touched map[string]bool
	segs    map[string]content // every segment ever built, by name
	check   checker
	quiet   bool // the end: no faults, no choices
	rates   rates
	failed  error // the first violation
	stats   *modelStats
	trace   maphash.Hash
}

// rates are drawn per seed, so that seeds differ in character.
type rates struct {
	fault, crash, late, abandon, write, hostCrash float64
	takeover                                      bool
	batch                                         int64
	calm                                          int // orchestrators close once in so many turns
	stop                                          func(Entry) bool
}

// record is the scheduler's KV record: it survives the scheduler.
type record struct {
	epoch   Epoch
	open    Seq
	highest Ordinal
	cycle   *cycle
}

type cycle struct {
	ordinal Ordinal
	base    Ordinal
	pass    bool
	k       uint32
	open    Seq
}

// modelTask is a ship task, kept for ever: any may be redelivered at any time.
type modelTask struct {
	id          string
	kind        Kind
	epoch       Epoch
	open        Seq
	base, point Ordinal
	pass        *Pass
	compare     bool // the pass compares with the chain instead of sending all (rule 13)
}

// actor is one process. It runs one job at a time and stops at every store call.
type actor struct {
	name    string
	w       *world
	store   *blobstoretest.Faulty
	r       *Replica // its memory: lost in a crash
	applier *Applier
	grant   chan blobstoretest.Fault
	busy    bool // a job runs
	op      blobstoretest.Op
	late    bool
	weight  int
}

type event struct {
	a    *actor
	done bool
	err  error
}

type modelStats struct {
	steps, commits, points, refused, crashes, faults, lates, redone, checkpoints, fences, passes, leaseLost, already, compared int
	rewinds, forwards, changes, again, reached, resyncs                                                                        int
}

func newWorld(seed uint64, b bugs, st *modelStats) *world {
	rng := rand.New(rand.NewPCG(seed, 77))
	w := &world{rng: rng, bugs: b, mem: blobstoretest.NewMemory(), clock: testTime, host: newModelHost(), events: make(chan event),
		touched: map[string]bool{}, segs: map[string]content{}, stats: st, rec: record{epoch: 1}}
	w.trace.SetSeed(modelSeed)
	w.check.w = w
	pick := func(v ...float64) float64 { return v[rng.IntN(len(v))] }
	w.rates = rates{fault: pick(0, .01, .03, .08), crash: pick(0, .01, .03), late: pick(0, .01, .04), abandon: pick(.01, .05, .2),
		write: pick(.05, .15, .3), hostCrash: pick(0, 0, .002, .005), takeover: rng.IntN(2) == 0, batch: []int64{1, 64 << 10, 1 << 30}[rng.IntN(3)]}
	w.rates.calm = []int{10, 20, 100}[rng.IntN(3)]
	if rng.IntN(2) == 0 {
		w.rates.stop = func(e Entry) bool { return e.Ordinal%3 == 0 }
	}
	for _, n := range []string{"ship-1", "ship-2", "apply-1", "apply-2", "scheduler", "orch-1", "orch-2"} {
		a := &actor{name: n, w: w, grant: make(chan blobstoretest.Fault)}
		a.store = blobstoretest.NewFaulty(lateStore{w.mem, w, a}, a.hook)
		w.actors = append(w.actors, a)
	}
	if _, err := Create(context.Background(), w.mem, testLineage); err != nil {
		w.fail("create: %v", err)
	}
	for range 4 {
		w.host.write(rng)
	}
	return w
}

var modelSeed = maphash.MakeSeed()

func (w *world) fail(format string, a ...any) {
	if w.failed == nil {
		w.failed = fmt.Errorf(format, a...)
	}
}

// hook stops the actor before each of its store calls until the world answers.
func (a *actor) hook(op blobstoretest.Op, _, _ string) blobstoretest.Fault {
	a.op = op
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
	a.busy = false
	if a.store.Crashed() {
		a.store.Revive()
		a.r, a.applier = nil, nil
	}
	switch {
	case e.err == nil:
	case errors.Is(e.err, ErrCorrupt), errors.Is(e.err, ErrInvalid):
		w.fail("%s: %v", a.name, e.err)
	case IsRefusal(e.err):
		w.stats.refused++
	case errors.Is(e.err, ErrLeaseLost):
		w.stats.leaseLost++
	case w.quiet && !errors.Is(e.err, blobstoretest.ErrInjected):
		w.fail("%s, with no faults: %v", a.name, e.err)
	}
}

// start gives an idle actor a job and runs it to its first store call.
func (w *world) start(a *actor, job func(ctx context.Context, r *Replica) error) {
	a.busy = true
	go func() {
		ctx := context.Background()
		err := func() (err error) {
			if a.r == nil {
				if a.r, err = open(ctx, a.store, testLineage, w.bugs); err != nil {
					a.r = nil
					return err
				}
				a.r.opens = 1 // one goroutine per actor
			}
			return job(ctx, a.r)
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
	if !w.quiet {
		switch x := w.rng.Float64(); {
		case x < w.rates.crash:
			fate = []blobstoretest.Fault{blobstoretest.Crash, blobstoretest.CrashAfter}[w.rng.IntN(2)]
			w.stats.crashes++
		case x < w.rates.crash+w.rates.fault:
			fate = []blobstoretest.Fault{blobstoretest.Before, blobstoretest.After}[w.rng.IntN(2)]
			w.stats.faults++
		case x < w.rates.crash+w.rates.fault+w.rates.late && canBeLate(a.op):
			a.late = true
			w.stats.lates++
		}
	}
	a.grant <- fate
	w.wait()
	a.late = false
	w.check.all()
}

// run is one interleaving.
func (w *world) run(steps int) error {
	for i := 0; i < steps && w.failed == nil; i++ {
		if i%40 == 0 { // some are fast, some all but asleep: a task is held for long
			for _, a := range w.actors {
				a.weight = []int{0, 1, 5, 20}[w.rng.IntN(4)]
				if w.check.closed && strings.HasPrefix(a.name, "orch") { // a rewind makes many calls, and nobody else has work
					a.weight = []int{1, 20, 20, 40}[w.rng.IntN(4)]
				}
			}
		}
		w.world()
		var total int
		for _, a := range w.actors {
			total += a.weight
		}
		if total == 0 {
			continue
		}
		n := w.rng.IntN(total)
		for _, a := range w.actors {
			if n -= a.weight; n < 0 {
				w.turn(a)
				break
			}
		}
	}
	w.end()
	return w.failed
}

// world moves what is not an actor: the guest, the host's power, the clock, requests on the wire.
func (w *world) world() {
	if w.rng.Float64() < w.rates.write {
		w.host.write(w.rng)
	}
	if w.rng.Float64() < w.rates.hostCrash {
		w.host.crash()
	}
	if w.rng.Float64() < .02 {
		d := time.Duration(w.rng.IntN(70)) * time.Second
		w.mem.Advance(d)
		w.clock = w.clock.Add(d)
	}
	if len(w.late) > 0 && w.rng.Float64() < .05 {
		w.deliver(w.rng.IntN(len(w.late)))
	}
}

func (w *world) deliver(i int) {
	f := w.late[i]
	w.late = append(w.late[:i], w.late[i+1:]...)
	f()
	w.check.all()
}

// turn steps a busy actor, or gives an idle one work.
func (w *world) turn(a *actor) {
	if a.busy {
		w.step(a)
		return
	}
	switch a.name {
	case "scheduler":
		w.start(a, w.tick)
	case "orch-1", "orch-2":
		calm := w.rates.calm
		switch {
		case w.check.closed:
			calm = 2
		case len(w.check.points) < 3:
			calm *= 10
		}
		if w.rng.IntN(calm) == 0 {
			w.start(a, w.fence)
		}
	case "apply-1", "apply-2":
		w.start(a, a.applyJob())
	default:
		if len(w.tasks) > 0 {
			w.start(a, a.shipJob(w.anyTask()))
		}
	}
}

// anyTask prefers new tasks; old ones come again now and then.
func (w *world) anyTask() *modelTask {
	n := len(w.tasks)
	if w.rng.IntN(4) == 0 {
		return w.tasks[w.rng.IntN(n)]
	}
	return w.tasks[n-1-w.rng.IntN(min(n, 3))]
}
