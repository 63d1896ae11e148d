package blobstoretest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"sync/atomic"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// Fault says what happens to one call of a Faulty store.
type Fault int

const (
	// None lets the call through.
	None Fault = iota
	// Before fails the call without any effect.
	Before
	// After performs the call and loses the answer: the caller gets ErrInjected, which is none of the
	// sentinels, whatever the outcome was.
	After
	// Crash fails the call without effect, and every later call until Revive: the client died before it.
	Crash
	// CrashAfter performs the call, loses the answer, and fails every later call until Revive.
	CrashAfter
	// Denied refuses the call with blobstore.ErrPermission, without any effect.
	Denied
)

// ErrInjected is what a caller sees of an injected fault. It is not one of the blobstore sentinels:
// the outcome is unknown.
var ErrInjected = errors.New("injected storage fault")

// ErrCrashed is what every call gets between a crash and Revive.
var ErrCrashed = errors.New("client has crashed")

// Op names the call a Hook is asked about; it is the name of the interface's method.
type Op string

// Operations that a Hook sees. Container and Close are never asked about.
const (
	OpCreateContainer Op = "CreateContainer"
	OpListContainers  Op = "ListContainers"
	OpNow             Op = "Now"
	OpPut             Op = "Put"
	OpGet             Op = "Get"
	OpStat            Op = "Stat"
	OpList            Op = "List"
	OpDelete          Op = "Delete"
	OpCreatePages     Op = "CreatePages"
	OpWritePages      Op = "WritePages"
	OpClearPages      Op = "ClearPages"
	OpReadPages       Op = "ReadPages"
	OpPageRanges      Op = "PageRanges"
	OpSetSequence     Op = "SetSequence"
	OpSnapshotPages   Op = "SnapshotPages"
	OpListSnapshots   Op = "ListSnapshots"
	OpDeleteSnapshot  Op = "DeleteSnapshot"
	OpAcquireLease    Op = "AcquireLease"
	OpRenewLease      Op = "RenewLease"
	OpReleaseLease    Op = "ReleaseLease"
	OpBreakLease      Op = "BreakLease"
)

// Writes reports whether the operation can change the store.
func (o Op) Writes() bool {
	switch o {
	case OpListContainers, OpNow, OpGet, OpStat, OpList, OpReadPages, OpPageRanges, OpListSnapshots:
		return false
	default:
		return true
	}
}

// Hook decides the fate of one call; it is called once per call, before it, possibly from several
// goroutines. Name is empty for calls on a container or the store. A hook may block or switch
// goroutines: a model test schedules its workers there.
type Hook func(op Op, container, name string) Fault

// FailNth returns a hook that answers fault to the n-th call (counting from 1) and None to all others.
func FailNth(n int64, fault Fault) Hook {
	var seen atomic.Int64
	return func(Op, string, string) Fault {
		if seen.Add(1) == n {
			return fault
		}
		return None
	}
}

// FailBefore fails the n-th call, counting from 1, without effect.
func FailBefore(n int64) Hook { return FailNth(n, Before) }

// FailAfter performs the n-th call, counting from 1, and loses its answer.
func FailAfter(n int64) Hook { return FailNth(n, After) }

// CrashAt crashes the client before the n-th call, counting from 1.
func CrashAt(n int64) Hook { return FailNth(n, Crash) }

// Faulty decorates one client's view of a store with scripted faults. Give each modelled worker its own
// Faulty over the same store: a crash then hits that worker only. Streams (Get's reader, List, PageRanges)
// are decided as one call; a crash later on also ends a stream that is being read.
type Faulty struct {
	inner   blobstore.Store
	hook    atomic.Pointer[Hook]
	crashed atomic.Bool
	calls   atomic.Int64
}

// NewFaulty decorates inner; a nil hook lets everything through.
func NewFaulty(inner blobstore.Store, hook Hook) *Faulty {
	f := &Faulty{inner: inner}
	f.SetHook(hook)
	return f
}

// SetHook replaces the script.
func (f *Faulty) SetHook(hook Hook) {
	if hook == nil {
		hook = func(Op, string, string) Fault { return None }
	}
	f.hook.Store(&hook)
}

// Crash makes every later call fail until Revive.
func (f *Faulty) Crash() { f.crashed.Store(true) }

// Revive ends a crash: the next client starts.
func (f *Faulty) Revive() { f.crashed.Store(false) }

// Crashed reports whether the client is down.
func (f *Faulty) Crashed() bool { return f.crashed.Load() }

// Calls returns how many calls reached the hook, so that a test can crash at each of them in turn.
func (f *Faulty) Calls() int64 { return f.calls.Load() }

// do runs one call under the script.
func (f *Faulty) do(op Op, container, name string, call func() error) error {
	where := func(err error) error { return fmt.Errorf("%s %s/%s: %w", op, container, name, err) }
	if f.crashed.Load() {
		return where(ErrCrashed)
	}
	f.calls.Add(1)
	fault := (*f.hook.Load())(op, container, name)
	if f.crashed.Load() { // another goroutine of this client crashed it while the hook blocked
		return where(ErrCrashed)
	}
	switch fault {
	case Before:
		return where(ErrInjected)
	case Denied:
		return where(blobstore.ErrPermission)
	case Crash:
		f.crashed.Store(true)
		return where(ErrCrashed)
	}
	err := call()
	switch fault {
	case After:
		return where(ErrInjected)
	case CrashAfter:
		f.crashed.Store(true)
		return where(ErrCrashed)
	}
	return err
}

// CreateContainer is scripted as OpCreateContainer.
func (f *Faulty) CreateContainer(ctx context.Context, name string) error {
	return f.do(OpCreateContainer, name, "", func() error { return f.inner.CreateContainer(ctx, name) })
}

// ListContainers is scripted as OpListContainers.
func (f *Faulty) ListContainers(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return scripted(f, OpListContainers, "", "", func() iter.Seq2[string, error] { return f.inner.ListContainers(ctx, prefix) })
}

// Now is scripted as OpNow.
func (f *Faulty) Now(ctx context.Context) (now time.Time, err error) {
	err = f.do(OpNow, "", "", func() (err error) { now, err = f.inner.Now(ctx); return })
	return now, err
}

// Close leaves the inner store open: it belongs to the test.
func (f *Faulty) Close() error { return nil }

// Container returns a scripted handle.
func (f *Faulty) Container(name string) blobstore.Container {
	return faultyContainer{f, f.inner.Container(name)}
}

// scripted runs a sequence under the script: any fault but None yields one error only.
func scripted[T any](f *Faulty, op Op, container, name string, seq func() iter.Seq2[T, error]) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var zero T
		if err := f.do(op, container, name, func() error { return nil }); err != nil {
			yield(zero, err)
			return
		}
		for v, err := range seq() {
			if f.crashed.Load() {
				yield(zero, ErrCrashed)
				return
			}
			if !yield(v, err) {
				return
			}
		}
	}
}

type faultyContainer struct {
	f     *Faulty
	inner blobstore.Container
}

func (c faultyContainer) Name() string { return c.inner.Name() }

func (c faultyContainer) do(op Op, name string, call func() error) error {
	return c.f.do(op, c.inner.Name(), name, call)
}

// props runs a call that returns properties, which are lost with the answer.
func (c faultyContainer) props(op Op, name string, call func() (blobstore.Properties, error)) (p blobstore.Properties, err error) {
	if err = c.do(op, name, func() (err error) { p, err = call(); return }); err != nil {
		return blobstore.Properties{}, err
	}
	return p, nil
}

func (c faultyContainer) Put(ctx context.Context, name string, body io.ReadSeeker, size int64, cond blobstore.Conditions) (blobstore.Properties, error) {
	return c.props(OpPut, name, func() (blobstore.Properties, error) { return c.inner.Put(ctx, name, body, size, cond) })
}

func (c faultyContainer) Get(ctx context.Context, name string, offset, length int64) (r io.ReadCloser, p blobstore.Properties, err error) {
	err = c.do(OpGet, name, func() (err error) { r, p, err = c.inner.Get(ctx, name, offset, length); return })
	if err != nil {
		if r != nil {
			_ = r.Close() // the answer was lost: nobody else can close it
		}
		return nil, blobstore.Properties{}, err
	}
	return faultyReader{c.f, r}, p, nil
}

type faultyReader struct {
	f *Faulty
	io.ReadCloser
}

func (r faultyReader) Read(p []byte) (int, error) {
	if r.f.crashed.Load() {
		return 0, ErrCrashed
	}
	return r.ReadCloser.Read(p)
}

func (c faultyContainer) Stat(ctx context.Context, name string, snapshot blobstore.SnapshotID) (blobstore.Properties, error) {
	return c.props(OpStat, name, func() (blobstore.Properties, error) { return c.inner.Stat(ctx, name, snapshot) })
}

func (c faultyContainer) List(ctx context.Context, prefix, after string) iter.Seq2[blobstore.Properties, error] {
	return scripted(c.f, OpList, c.Name(), "", func() iter.Seq2[blobstore.Properties, error] { return c.inner.List(ctx, prefix, after) })
}

func (c faultyContainer) Delete(ctx context.Context, name string, cond blobstore.Conditions) error {
	return c.do(OpDelete, name, func() error { return c.inner.Delete(ctx, name, cond) })
}

func (c faultyContainer) CreatePages(ctx context.Context, name string, size int64, metadata map[string]string, cond blobstore.Conditions) (blobstore.Properties, error) {
	return c.props(OpCreatePages, name, func() (blobstore.Properties, error) {
		return c.inner.CreatePages(ctx, name, size, metadata, cond)
	})
}

func (c faultyContainer) WritePages(ctx context.Context, name string, offset int64, data []byte, cond blobstore.Conditions) (blobstore.Properties, error) {
	return c.props(OpWritePages, name, func() (blobstore.Properties, error) {
		return c.inner.WritePages(ctx, name, offset, data, cond)
	})
}

func (c faultyContainer) ClearPages(ctx context.Context, name string, offset, length int64, cond blobstore.Conditions) (blobstore.Properties, error) {
	return c.props(OpClearPages, name, func() (blobstore.Properties, error) {
		return c.inner.ClearPages(ctx, name, offset, length, cond)
	})
}

func (c faultyContainer) ReadPages(ctx context.Context, name string, snapshot blobstore.SnapshotID, offset int64, buf []byte) error {
	return c.do(OpReadPages, name, func() error { return c.inner.ReadPages(ctx, name, snapshot, offset, buf) })
}

func (c faultyContainer) PageRanges(ctx context.Context, name string, snapshot blobstore.SnapshotID, offset, length int64) iter.Seq2[blobstore.PageRange, error] {
	return scripted(c.f, OpPageRanges, c.Name(), name, func() iter.Seq2[blobstore.PageRange, error] {
		return c.inner.PageRanges(ctx, name, snapshot, offset, length)
	})
}

func (c faultyContainer) SetSequence(ctx context.Context, name string, n int64, cond blobstore.Conditions) (blobstore.Properties, error) {
	return c.props(OpSetSequence, name, func() (blobstore.Properties, error) { return c.inner.SetSequence(ctx, name, n, cond) })
}

func (c faultyContainer) SnapshotPages(ctx context.Context, name string, metadata map[string]string, cond blobstore.Conditions) (id blobstore.SnapshotID, p blobstore.Properties, err error) {
	err = c.do(OpSnapshotPages, name, func() (err error) { id, p, err = c.inner.SnapshotPages(ctx, name, metadata, cond); return })
	if err != nil {
		return "", blobstore.Properties{}, err
	}
	return id, p, nil
}

func (c faultyContainer) ListSnapshots(ctx context.Context, name string) iter.Seq2[blobstore.Properties, error] {
	return scripted(c.f, OpListSnapshots, c.Name(), name, func() iter.Seq2[blobstore.Properties, error] { return c.inner.ListSnapshots(ctx, name) })
}

func (c faultyContainer) DeleteSnapshot(ctx context.Context, name string, snapshot blobstore.SnapshotID) error {
	return c.do(OpDeleteSnapshot, name, func() error { return c.inner.DeleteSnapshot(ctx, name, snapshot) })
}

func (c faultyContainer) AcquireLease(ctx context.Context, name string, id blobstore.LeaseID, duration time.Duration) error {
	return c.do(OpAcquireLease, name, func() error { return c.inner.AcquireLease(ctx, name, id, duration) })
}

func (c faultyContainer) RenewLease(ctx context.Context, name string, id blobstore.LeaseID) error {
	return c.do(OpRenewLease, name, func() error { return c.inner.RenewLease(ctx, name, id) })
}

func (c faultyContainer) ReleaseLease(ctx context.Context, name string, id blobstore.LeaseID) error {
	return c.do(OpReleaseLease, name, func() error { return c.inner.ReleaseLease(ctx, name, id) })
}

func (c faultyContainer) BreakLease(ctx context.Context, name string) error {
	return c.do(OpBreakLease, name, func() error { return c.inner.BreakLease(ctx, name) })
}
