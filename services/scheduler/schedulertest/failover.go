package schedulertest

import (
	"context"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
)

// Failover is the failover-orchestrator's side of one failover: its record and its fences in storage.
type Failover struct {
	w    *World
	kv   *bus.KV[*failoverv1.Failover]
	id   string
	line string
}

// StartFailover writes the record of a failover in its first phase.
func (w *World) StartFailover(h *Host, id string, kind failoverv1.FailoverKind) *Failover {
	return w.StartFailoverAt(h, id, kind, time.Now())
}

// StartFailoverAt is StartFailover by another clock.
func (w *World) StartFailoverAt(h *Host, id string, kind failoverv1.FailoverKind, at time.Time) *Failover {
	kv, err := bus.OpenKV[*failoverv1.Failover](testkit.Context(w.t), w.Bus, bus.BucketFailovers)
	require.NoError(w.t, err)
	rec := w.Record(h)
	require.NotNil(w.t, rec)
	_, err = kv.Create(testkit.Context(w.t), bus.Key(id), &failoverv1.Failover{
		Name: "failovers/" + id, Vm: rec.GetName(), Lineage: rec.GetLineage(), Kind: kind,
		Phase: failoverv1.FailoverPhase_FAILOVER_PHASE_STARTING, CreateTime: timestamppb.New(at),
	})
	require.NoError(w.t, err)
	return &Failover{w: w, kv: kv, id: id, line: rec.GetLineage()}
}

// Name is the resource name.
func (f *Failover) Name() string { return "failovers/" + f.id }

// Phase writes the phase.
func (f *Failover) Phase(p failoverv1.FailoverPhase) {
	f.change(func(rec *failoverv1.Failover) { rec.Phase = p })
}

func (f *Failover) change(do func(rec *failoverv1.Failover)) {
	_, _, err := f.kv.Mutate(testkit.Context(f.w.t), bus.Key(f.id), func(rec *failoverv1.Failover) error {
		do(rec)
		return nil
	})
	require.NoError(f.w.t, err)
}

func (f *Failover) commit(kind replica.Kind) uint64 {
	ctx, cancel := context.WithCancel(testkit.Context(f.w.t))
	defer cancel()
	chain, err := replica.Open(ctx, f.w.Store, replica.Lineage(f.line))
	require.NoError(f.w.t, err)
	result, err := chain.Commit(ctx, replica.Proposal{Kind: kind, Failover: f.id})
	require.NoError(f.w.t, err)
	return uint64(result.Seq)
}

// Close commits the close, in storage only: the record does not say so yet.
func (f *Failover) Close() uint64 { return f.commit(replica.KindClose) }

// CloseAndSay commits the close and writes its number into the record.
func (f *Failover) CloseAndSay() {
	seq := f.Close()
	f.change(func(rec *failoverv1.Failover) { rec.CloseSequence = seq })
}

// Open commits the open and writes its number into the record.
func (f *Failover) Open() {
	seq := f.commit(replica.KindOpen)
	f.change(func(rec *failoverv1.Failover) { rec.OpenSequence = seq })
}

// Delete takes the record away.
func (f *Failover) Delete() {
	_, rev, err := f.kv.Get(testkit.Context(f.w.t), bus.Key(f.id))
	require.NoError(f.w.t, err)
	require.NoError(f.w.t, f.kv.Delete(testkit.Context(f.w.t), bus.Key(f.id), rev))
}
