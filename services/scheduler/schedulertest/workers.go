package schedulertest

import (
	"context"
	"fmt"
	"maps"
	"sync"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	resyncenginev1 "github.com/landfall-dr/landfall/proto/gen/landfall/resyncengine/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

// Workers ship, compare and apply. What they ship has no bytes: the manifests are real, and a ledger beside them knows what
// each stands for.
type Workers struct {
	bus   *bus.Bus
	store blobstore.Store
	hosts map[string]*Host // by resource name

	mu      sync.Mutex
	ledger  map[entry]Image
	hook    func(ctx context.Context, task proto.Message) error
	applied []*uploaderv1.ApplyTask
	points  []*uploaderv1.ShipTask // every point task seen, redeliveries too
}

// entry names what a manifest carries.
type entry struct {
	lineage string
	ordinal uint64
	index   uint32
}

// Hook is asked before each ship or compare task is worked on; it may wait as long as ctx lasts. An error that has a reason is reported as
// ShipFailed, any other fails the delivery. Nil heals.
func (w *Workers) Hook(f func(ctx context.Context, task proto.Message) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hook = f
}

// Applied returns the apply tasks seen.
func (w *Workers) Applied() []*uploaderv1.ApplyTask {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]*uploaderv1.ApplyTask(nil), w.applied...)
}

// PointTasks returns the point tasks seen, in order, repeats included.
func (w *Workers) PointTasks() []*uploaderv1.ShipTask {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]*uploaderv1.ShipTask(nil), w.points...)
}

func (w *Workers) ask(ctx context.Context, task proto.Message) error {
	w.mu.Lock()
	hook := w.hook
	w.mu.Unlock()
	if hook == nil {
		return nil
	}
	return hook(ctx, task)
}

// remember writes the ledger. Two deliveries of a pass task may have read different live data: the first commit counts,
// and both are right for the cut that follows.
func (w *Workers) remember(e entry, image Image) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ledger[e] = image
}

func (w *Workers) shipped(e entry) Image {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ledger[e]
}

// report ends a task that failed for a stated reason; anything else is tried again by the queue.
func (w *Workers) report(ctx context.Context, vm, lineage string, ordinal, epoch uint64, err error) error {
	reason := errcat.Reason(err)
	if replica.IsRefusal(err) {
		reason = typesv1.ErrorReason_ERROR_REASON_ORDINAL_USED
	}
	if reason == typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED || ctx.Err() != nil {
		return err
	}
	return w.tell(ctx, vm, "ship.failed", "", &eventsv1.ShipFailed{
		Vm: vm, Lineage: lineage, Ordinal: ordinal, Epoch: epoch,
		Error: &typesv1.ErrorDetail{Reason: errcat.Code(reason), What: err.Error(), Time: timestamppb.Now()},
	})
}

func (w *Workers) tell(ctx context.Context, vm, typ, id string, payload proto.Message) error {
	site, name := splitName(vm)
	return w.bus.PublishEvent(ctx, bus.Event{Type: typ, Site: site, VM: name, ID: id, Payload: payload})
}

// Ship handles one task of the queue "ship".
func (w *Workers) Ship(ctx context.Context, t *bus.Task) error {
	var task uploaderv1.ShipTask
	if err := t.Decode(&task); err != nil {
		return err
	}
	if task.GetPoint() != nil {
		w.mu.Lock()
		w.points = append(w.points, proto.Clone(&task).(*uploaderv1.ShipTask))
		w.mu.Unlock()
	}
	err := w.ask(ctx, &task)
	if err == nil {
		err = w.ship(ctx, &task)
	}
	if err != nil {
		return w.report(ctx, task.GetVm(), task.GetLineage(), max(task.GetPoint().GetOrdinal(), task.GetPass().GetOrdinal()), task.GetEpoch(), err)
	}
	return nil
}

func (w *Workers) ship(ctx context.Context, task *uploaderv1.ShipTask) error {
	host := w.hosts[task.GetHost()]
	chain, err := replica.Open(ctx, w.store, replica.Lineage(task.GetLineage()))
	if err != nil {
		return err
	}
	proposal := replica.Proposal{Epoch: replica.Epoch(task.GetEpoch()), Open: replica.Seq(task.GetOpen()), Base: replica.Ordinal(task.GetBase())}
	if p := task.GetPass(); p != nil {
		image, err := host.Range(p.GetOrdinal(), p.GetDisk(), p.GetWindow())
		if err != nil {
			return err
		}
		proposal.Kind = replica.KindPartial
		proposal.Pass = &replica.Pass{Ordinal: replica.Ordinal(p.GetOrdinal()), I: uint32(p.GetIndex()), K: uint32(p.GetTasks())}
		w.remember(entry{task.GetLineage(), p.GetOrdinal(), uint32(p.GetIndex())}, image)
		result, err := chain.Commit(ctx, proposal)
		if err != nil {
			return err
		}
		return w.tell(ctx, task.GetVm(), "pass-task.shipped", bus.EventID(task.GetLineage(), "pass", fmt.Sprint(p.GetOrdinal(), p.GetIndex())), &eventsv1.PassTaskShipped{
			Vm: task.GetVm(), Lineage: task.GetLineage(), Pass: p.GetOrdinal(), Index: p.GetIndex(), Tasks: p.GetTasks(),
			Sequence: uint64(result.Seq), CoveredBytes: p.GetWindow().GetLength(), StoredBytes: int64(len(image)) * 1000,
		})
	}
	p := task.GetPoint()
	proposal.Kind, proposal.Point, proposal.CutTime = replica.KindPoint, replica.Ordinal(p.GetOrdinal()), p.GetCutTime().AsTime()
	if p.GetKind() == typesv1.PointKind_POINT_KIND_BASE {
		proposal.Kind = replica.KindBase
	}
	proposal.Consistency, proposal.Disks = replica.ConsistencyCrash, disks(task.GetDisks())
	if p.GetConsistency() == typesv1.Consistency_CONSISTENCY_APPLICATION {
		proposal.Consistency = replica.ConsistencyApp
	}
	image, err := host.Changes(p.GetOrdinal())
	if err != nil {
		if _, ferr := chain.Find(ctx, replica.Ordinal(p.GetOrdinal())); ferr != nil {
			return err
		}
	} else {
		w.remember(entry{task.GetLineage(), p.GetOrdinal(), 0}, image)
	}
	result, err := chain.Commit(ctx, proposal)
	if err != nil {
		return err
	}
	return w.tell(ctx, task.GetVm(), "recovery-point.received", bus.EventID(task.GetLineage(), "received", fmt.Sprint(p.GetOrdinal())), &eventsv1.RecoveryPointReceived{
		Vm: task.GetVm(), Lineage: task.GetLineage(), Point: p.GetOrdinal(), Sequence: uint64(result.Seq), Kind: p.GetKind(), CutTime: p.GetCutTime(),
		Consistency: p.GetConsistency(), ChangedBytes: int64(len(image)) * BlockSize, StoredBytes: int64(len(image)) * 1000,
		AlreadyCommitted: result.Outcome == replica.AlreadyCommitted,
	})
}

func disks(in []*typesv1.Disk) []replica.Disk {
	out := make([]replica.Disk, len(in))
	for i, d := range in {
		out[i] = replica.Disk{ID: d.GetId(), Gen: 1, Size: d.GetSizeBytes()}
	}
	return out
}

// Compare handles one task of the queue "resync": an empty partial at exactly n+1, then one with the difference.
func (w *Workers) Compare(ctx context.Context, t *bus.Task) error {
	var task resyncenginev1.CompareTask
	if err := t.Decode(&task); err != nil {
		return err
	}
	err := w.ask(ctx, &task)
	if err == nil {
		err = w.compare(ctx, &task)
	}
	if err != nil {
		return w.report(ctx, task.GetVm(), task.GetLineage(), task.GetPass(), task.GetEpoch(), err)
	}
	return nil
}

func (w *Workers) compare(ctx context.Context, task *resyncenginev1.CompareTask) error {
	host := w.hosts[task.GetHost()]
	chain, err := replica.Open(ctx, w.store, replica.Lineage(task.GetLineage()))
	if err != nil {
		return err
	}
	state, err := chain.Refresh(ctx)
	if err != nil {
		return err
	}
	have, err := w.fold(ctx, chain, state.Head, nil)
	if err != nil {
		return err
	}
	const parts = 2
	propose := func(i uint32, at replica.Seq) error {
		_, err := chain.Commit(ctx, replica.Proposal{
			Kind: replica.KindPartial, Epoch: replica.Epoch(task.GetEpoch()), Open: replica.Seq(task.GetOpen()),
			Pass: &replica.Pass{Ordinal: replica.Ordinal(task.GetPass()), I: i, K: parts}, At: at,
		})
		return err
	}
	first := replica.Seq(0)
	if _, ok := state.Pass(replica.Ordinal(task.GetPass())); !ok {
		first = state.Head + 1
	}
	w.remember(entry{task.GetLineage(), task.GetPass(), 1}, Image{})
	if err := propose(1, first); err != nil {
		return err
	}
	live, differ := host.Live(), Image{}
	for b, v := range live {
		if have[b] != v {
			differ[b] = v
		}
	}
	w.remember(entry{task.GetLineage(), task.GetPass(), parts}, differ)
	if err := propose(parts, 0); err != nil {
		return err
	}
	state, err = chain.Refresh(ctx)
	if err != nil {
		return err
	}
	var size int64
	for _, d := range task.GetDisks() {
		size += d.GetSizeBytes()
	}
	return w.tell(ctx, task.GetVm(), "pass-task.shipped", bus.EventID(task.GetLineage(), "compare", fmt.Sprint(task.GetPass())), &eventsv1.PassTaskShipped{
		Vm: task.GetVm(), Lineage: task.GetLineage(), Pass: task.GetPass(), Index: parts, Tasks: parts, Sequence: uint64(state.Head),
		CoveredBytes: size, StoredBytes: int64(len(differ)) * 1000, DifferingBytes: int64(len(differ)) * BlockSize,
	})
}

// Apply handles one task of the queue "apply": it says that everything is processed.
func (w *Workers) Apply(ctx context.Context, t *bus.Task) error {
	var task uploaderv1.ApplyTask
	if err := t.Decode(&task); err != nil {
		return err
	}
	w.mu.Lock()
	w.applied = append(w.applied, proto.Clone(&task).(*uploaderv1.ApplyTask))
	w.mu.Unlock()
	chain, err := replica.Open(ctx, w.store, replica.Lineage(task.GetLineage()))
	if err != nil {
		return err
	}
	m, err := chain.Manifest(ctx, replica.Seq(task.GetSequence()))
	if err != nil || !m.Kind.IsPoint() {
		return err
	}
	return w.tell(ctx, task.GetVm(), "recovery-point.processed", bus.EventID(task.GetLineage(), "processed", fmt.Sprint(m.Point)), &eventsv1.RecoveryPointProcessed{
		Vm: task.GetVm(), Lineage: task.GetLineage(), Point: uint64(m.Point), Sequence: task.GetSequence(),
	})
}

// fold replays the chain up to a manifest; each is called with what stands at every base and point.
func (w *Workers) fold(ctx context.Context, chain *replica.Replica, to replica.Seq, each func(m *replica.Manifest, at Image) error) (Image, error) {
	image := Image{}
	for seq := replica.Seq(1); seq <= to; seq++ {
		m, err := chain.Manifest(ctx, seq)
		if err != nil {
			return nil, err
		}
		e := entry{string(m.Lineage), uint64(m.Ordinal()), 0}
		if m.Pass != nil {
			e.index = m.Pass.I
		}
		maps.Copy(image, w.shipped(e))
		if m.Kind.IsPoint() && each != nil {
			if err := each(m, image); err != nil {
				return nil, err
			}
		}
	}
	return image, nil
}
