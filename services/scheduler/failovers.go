package scheduler

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/landfall-dr/landfall/libs/bus"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
)

// failovers is the bucket of the failover records as the watch shows it: planned and unplanned ones, by VM. It may be
// behind; every decision that a record leads to is right for an older one too, and storage holds the lock.
type failovers struct {
	current chan struct{} // closed when the watch has shown what was there at its start

	mu   sync.Mutex
	keys map[string]string // of the bucket, to the VM's name
	vms  map[string]map[string]*failoverv1.Failover
}

func newFailovers() *failovers {
	return &failovers{current: make(chan struct{}), keys: map[string]string{}, vms: map[string]map[string]*failoverv1.Failover{}}
}

// await waits until the bucket was read once; false when ctx ended before.
func (f *failovers) await(ctx context.Context) bool {
	select {
	case <-f.current:
		return true
	case <-ctx.Done():
		return false
	}
}

// put notes a record, or with nil that it is gone, and returns the VM that it is about; empty for a test.
func (f *failovers) put(key string, rec *failoverv1.Failover) (vm string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	vm = f.keys[key]
	if rec == nil || !takesOver(rec) {
		delete(f.keys, key)
		delete(f.vms[vm], key)
		if len(f.vms[vm]) == 0 {
			delete(f.vms, vm)
		}
		return vm
	}
	vm = rec.GetVm()
	f.keys[key] = vm
	if f.vms[vm] == nil {
		f.vms[vm] = map[string]*failoverv1.Failover{}
	}
	f.vms[vm][key] = rec
	return vm
}

// of lists the failovers of one protection of a VM, newest first. They are not to be changed.
func (f *failovers) of(vm, lineage string) []*failoverv1.Failover {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []*failoverv1.Failover
	for _, rec := range f.vms[vm] {
		if rec.GetLineage() == lineage {
			out = append(out, rec)
		}
	}
	slices.SortFunc(out, func(a, b *failoverv1.Failover) int {
		return cmp.Or(b.GetCreateTime().AsTime().Compare(a.GetCreateTime().AsTime()), cmp.Compare(b.GetName(), a.GetName()))
	})
	return out
}

// elsewhere reports whether a failover is one of another protection of the VM: its fence is not this one's to touch.
func (f *failovers) elsewhere(vm, lineage, name string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, rec := range f.vms[vm] {
		if rec.GetName() == name && rec.GetLineage() != lineage {
			return true
		}
	}
	return false
}

// takesOver tells failovers that a VM's record follows from drills.
func takesOver(f *failoverv1.Failover) bool {
	return f.GetKind() == failoverv1.FailoverKind_FAILOVER_KIND_PLANNED || f.GetKind() == failoverv1.FailoverKind_FAILOVER_KIND_UNPLANNED
}

// closedOnly reports whether the record itself says that the lineage is closed by it and not open again.
func closedOnly(f *failoverv1.Failover) bool {
	return f.GetCloseSequence() != 0 && f.GetOpenSequence() == 0
}

// calls reports whether a failover that no record follows yet has to be followed. One that was cancelled, or that came
// to nothing before it closed the lineage, has left no trace in storage and none on the host.
func calls(f *failoverv1.Failover) bool {
	switch f.GetPhase() {
	case phaseStarting, phaseWaiting, phaseCommitting, phaseCommitted:
		return true
	case phaseFailed, phaseCancelling, phaseCancelFailed:
		return closedOnly(f)
	}
	return false
}

// The phases of a failover's record, without the prefix that generated code puts before them.
const (
	phaseStarting     = failoverv1.FailoverPhase_FAILOVER_PHASE_STARTING
	phaseWaiting      = failoverv1.FailoverPhase_FAILOVER_PHASE_WAITING_COMMIT
	phaseCommitting   = failoverv1.FailoverPhase_FAILOVER_PHASE_COMMITTING
	phaseCommitted    = failoverv1.FailoverPhase_FAILOVER_PHASE_COMMITTED
	phaseCancelling   = failoverv1.FailoverPhase_FAILOVER_PHASE_CANCELLING
	phaseCancelled    = failoverv1.FailoverPhase_FAILOVER_PHASE_CANCELLED
	phaseFailed       = failoverv1.FailoverPhase_FAILOVER_PHASE_FAILED
	phaseCancelFailed = failoverv1.FailoverPhase_FAILOVER_PHASE_CANCEL_FAILED
)

// watchFailovers keeps the records and wakes up their VMs.
func (r *reconciler) watchFailovers(ctx context.Context) error {
	for u, err := range r.store.failovers.Watch(ctx, "") {
		if err != nil {
			return fmt.Errorf("watch the failovers: %w", err)
		}
		vm := ""
		switch u.Kind {
		case bus.Current:
			select {
			case <-r.followed.current:
			default:
				close(r.followed.current)
			}
		case bus.Put:
			vm = r.followed.put(u.Key, u.Value)
		case bus.Deleted:
			vm = r.followed.put(u.Key, nil)
		}
		if key := keyOf(vm); key != "" {
			r.queue.add(key)
		}
	}
	return nil
}
