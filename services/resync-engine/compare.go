package resyncengine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/landfall-dr/landfall/libs/bandwidth"
	"github.com/landfall-dr/landfall/libs/bandwidth/pacing"
	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/segment"
	"github.com/landfall-dr/landfall/libs/shipping"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	resyncenginev1 "github.com/landfall-dr/landfall/proto/gen/landfall/resyncengine/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

const (
	// trackerService is the name under which hosts serve their change tracker.
	trackerService = "change-tracker"
	// defaultChunk is the chunk of a task that names none, in bytes.
	defaultChunk = 64 << 10
	// readBytes is how much of the replica one hash worker reads at once.
	readBytes = 1 << 20
	// maxRanges bounds the ranges of one call to a host.
	maxRanges = 8192
	// maxBegins bounds how often a pass begins again because the head moved. Late commits are of tasks granted before;
	// there is a handful of those.
	maxBegins = 8
	// maxDamaged is how often a window is read again because data changed between the host's checksum and the segment.
	maxDamaged = 2
)

// Hosts finds the services of hosts; *rpc.Hosts does.
type Hosts interface {
	Conn(ctx context.Context, host, service string) (grpc.ClientConnInterface, error)
}

// comparer carries out comparing passes.
type comparer struct {
	config  Config
	store   blobstore.Store
	hosts   Hosts
	pool    *shipping.Pool
	codec   *shipping.Codec
	clock   func() time.Time
	metrics *metrics
	logger  *slog.Logger
}

// done is one partial that is in the chain.
type done struct {
	seq     replica.Seq
	index   uint32
	tasks   uint32
	covered int64
	stored  int64
	// differing is the length of the chunks that differed; 0 when an earlier delivery committed the partial.
	differing int64
}

// run is one task in work.
type run struct {
	*comparer
	t     *resyncenginev1.CompareTask
	r     *replica.Replica
	vm    string
	chunk int64
	disks []replica.Disk
	plan  []window
	say   func(context.Context, done) error // publishes; called from several goroutines
}

// compare brings every partial of the pass into the chain and says so. The error is final for the task unless ctx is over
// or a failpoint made it.
func (c *comparer) compare(ctx context.Context, t *resyncenginev1.CompareTask, say func(context.Context, done) error) error {
	machine, err := shipping.ParseMachine(t.GetVm())
	if err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, err, "read the task")
	}
	w := &run{comparer: c, t: t, vm: machine.VM, chunk: t.GetChunkBytes(), say: say}
	if w.chunk == 0 {
		w.chunk = defaultChunk
	}
	if w.chunk < 4096 || w.chunk > readBytes || w.chunk&(w.chunk-1) != 0 {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "chunk of %d bytes, want a power of two from 4096 to %d", w.chunk, readBytes)
	}
	octx, cancel := context.WithTimeout(ctx, c.config.StorageTimeout)
	defer cancel()
	if w.r, err = replica.Open(octx, c.store, replica.Lineage(t.GetLineage())); err != nil {
		return fmt.Errorf("open the journal: %w", err)
	}
	st, err := w.r.Refresh(octx)
	if err != nil {
		return fmt.Errorf("read the chain: %w", err)
	}
	if w.disks, err = shipping.Geometry(st, t.GetDisks()); err != nil {
		return err
	}
	w.plan = plan(w.disks, c.config.WindowBytes)
	n, err := w.begin(ctx)
	if err != nil {
		return err
	}
	return w.windows(ctx, n)
}

func (w *run) pass() replica.Ordinal { return replica.Ordinal(w.t.GetPass()) }
func (w *run) tasks() uint32         { return uint32(len(w.plan)) + 1 }

// progress reads which partials are in the chain.
func (w *run) progress(ctx context.Context) (replica.PassProgress, *replica.State, error) {
	ctx, cancel := context.WithTimeout(ctx, w.config.StorageTimeout)
	defer cancel()
	st, err := w.r.Refresh(ctx)
	if err != nil {
		return replica.PassProgress{}, nil, fmt.Errorf("read the chain: %w", err)
	}
	p, ok := st.Pass(w.pass())
	if ok && p.K != w.tasks() {
		return p, st, errcat.New(typesv1.ErrorReason_ERROR_REASON_PASS_OUT_OF_ORDER,
			"pass %d has %d tasks in the chain and %d here: the window size or the disks changed", p.Ordinal, p.K, w.tasks())
	}
	return p, st, nil
}

// begin finds the manifest n that the pass compares with, or chooses it: the head, with the empty first partial at exactly
// n+1 (rule 13).
func (w *run) begin(ctx context.Context) (n replica.Seq, err error) {
	for range maxBegins {
		p, _, err := w.progress(ctx)
		if err != nil {
			return 0, err
		}
		if p.Done > 0 {
			return w.resume(ctx, p)
		}
		if n, err = w.drain(ctx); err != nil {
			return 0, err
		}
		res, err := w.commit(ctx, replica.Proposal{Pass: w.partial(1), At: n + 1})
		switch {
		case errors.Is(err, replica.ErrHeadMoved):
			w.logger.InfoContext(ctx, "a late commit came between the snapshot and the pass, beginning again", "sequence", uint64(n))
			continue
		case err != nil:
			return 0, err
		case res.Outcome == replica.AlreadyCommitted:
			continue // another worker began the same pass, perhaps at another n: take over its
		}
		return n, w.say(ctx, done{seq: res.Seq, index: 1, tasks: w.tasks()})
	}
	return 0, errcat.New(typesv1.ErrorReason_ERROR_REASON_CONCURRENT_MODIFICATION, "begin pass %d: the head moved %d times", w.pass(), maxBegins)
}

// resume finds the first partial of a pass that began earlier, and says again what is in the chain, in case its events
// were lost.
func (w *run) resume(ctx context.Context, p replica.PassProgress) (replica.Seq, error) {
	var manifests []*replica.Manifest
	first := replica.Seq(0)
	for seq := p.Last; seq > 0 && first == 0; seq-- {
		mctx, cancel := context.WithTimeout(ctx, w.config.StorageTimeout)
		m, err := w.r.Manifest(mctx, seq)
		cancel()
		if err != nil {
			return 0, fmt.Errorf("find the first partial: %w", err)
		}
		if m.Pass == nil || m.Pass.Ordinal != w.pass() {
			continue // a fence
		}
		manifests = append(manifests, m)
		if m.Pass.I == 1 {
			first = seq
		}
	}
	if first == 0 {
		return 0, errcat.New(typesv1.ErrorReason_ERROR_REASON_CHAIN_BROKEN, "pass %d has no first partial", w.pass())
	}
	w.logger.InfoContext(ctx, "comparison goes on", "pass", uint64(w.pass()), "done", p.Done, "tasks", p.K)
	for _, m := range slices.Backward(manifests) {
		d := done{seq: m.Seq, index: m.Pass.I, tasks: m.Pass.K}
		if m.Pass.I > 1 {
			d.covered = w.plan[m.Pass.I-2].Len
		}
		for _, disk := range m.Disks {
			for _, s := range disk.Segments {
				d.stored += s.Bytes
			}
		}
		if err := w.say(ctx, d); err != nil {
			return 0, err
		}
	}
	return first - 1, nil
}

// drain brings the replica disks to the head and checkpoints them there where that is allowed, and returns the head.
func (w *run) drain(ctx context.Context) (replica.Seq, error) {
	dctx, cancel := context.WithTimeout(ctx, w.config.DrainTimeout)
	defer cancel()
	progress, err := shipping.Drain(dctx, w.r, replica.ApplierOptions{Clock: w.clock})
	switch {
	case ctx.Err() != nil:
		return 0, ctx.Err()
	case errors.Is(err, replica.ErrBusy), errors.Is(err, replica.ErrLeaseLost), errors.Is(err, context.DeadlineExceeded):
		w.logger.InfoContext(ctx, "the replica disks are not drained, comparing with the journal above the newest checkpoint", "error", err)
	case err != nil:
		return 0, fmt.Errorf("drain: %w", err)
	}
	sctx, cancel := context.WithTimeout(ctx, w.config.StorageTimeout)
	defer cancel()
	st, err := w.r.Refresh(sctx)
	if err != nil {
		return 0, fmt.Errorf("read the chain: %w", err)
	}
	if st.Head == 0 || progress.Applied != st.Head {
		return st.Head, nil
	}
	m, err := w.r.Manifest(sctx, st.Head)
	if err != nil {
		return 0, fmt.Errorf("read the head: %w", err)
	}
	if m.Kind.IsPoint() || m.Kind == replica.KindRewind {
		if _, err := w.r.Checkpoint(sctx, st.Head); err != nil {
			w.logger.InfoContext(ctx, "no checkpoint at the head, comparing with an older one", "sequence", uint64(st.Head), "error", err)
		}
	}
	return st.Head, nil
}

func (w *run) partial(i uint32) *replica.Pass {
	return &replica.Pass{Ordinal: w.pass(), I: i, K: w.tasks()}
}

// commit proposes a partial; the caller sets the pass, the disks and, for the first, the number.
func (w *run) commit(ctx context.Context, p replica.Proposal) (replica.Result, error) {
	p.Kind, p.Epoch, p.Open, p.Base = replica.KindPartial, replica.Epoch(w.t.GetEpoch()), replica.Seq(w.t.GetOpen()), replica.Ordinal(w.t.GetBase())
	p.Host, p.Reason, p.Trace = w.t.GetHost(), "resynchronisation", traceparent(ctx)
	if err := failpoint.Hit(fpBeforeManifest); err != nil {
		return replica.Result{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, w.config.StorageTimeout)
	defer cancel()
	res, err := w.r.Commit(ctx, p)
	if err != nil {
		return res, err
	}
	return res, failpoint.Hit(fpAfterManifest)
}

// maxReopened bounds how often retention may take what the replica is read from. What n is reached from does not go before n
// has a checkpoint of its own, so once is what it takes.
const maxReopened = 3

// windows compares what is not in the chain yet. n is not pinned (this role may not): it stays as the newest point, but an
// older checkpoint that it was opened from may go when it gets one of its own. Then it is opened anew.
func (w *run) windows(ctx context.Context, n replica.Seq) error {
	for try := 1; ; try++ {
		err := w.windowsOnce(ctx, n)
		if try == maxReopened || ctx.Err() != nil || !errors.Is(err, replica.ErrNotReachable) {
			return err
		}
		w.logger.InfoContext(ctx, "retention took what the replica was read from, opening it anew", "sequence", uint64(n), "error", err)
	}
}

func (w *run) windowsOnce(ctx context.Context, n replica.Seq) error {
	p, st, err := w.progress(ctx)
	if err != nil || p.Complete {
		return err
	}
	cctx, cancel := context.WithTimeout(ctx, w.config.HostTimeout)
	defer cancel()
	conn, err := w.hosts.Conn(cctx, shipping.HostID(w.t.GetHost()), trackerService)
	if err != nil {
		return fmt.Errorf("reach host %s: %w", w.t.GetHost(), err)
	}
	client := changetrackerv1.NewChangeTrackerServiceClient(conn)
	tctx, cancel := context.WithTimeout(ctx, w.config.DrainTimeout) // as with the drain, the journal above the checkpoint is read
	defer cancel()
	targets, err := w.targets(tctx, st, n)
	if err != nil {
		return err
	}
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(w.config.Windows)
	for _, v := range w.plan {
		if !slices.Contains(p.Missing, v.index) {
			continue
		}
		group.Go(func() error {
			if gctx.Err() != nil {
				return gctx.Err()
			}
			if err := w.window(gctx, client, targets[v.disk.ID], v); err != nil {
				return fmt.Errorf("window %d of disk %s: %w", v.Off, v.disk.ID, err)
			}
			return nil
		})
	}
	return group.Wait()
}

// targets opens every disk as it is at n; a disk that the chain did not have there is nil, which is all zeros.
func (w *run) targets(ctx context.Context, st *replica.State, n replica.Seq) (map[string]*replica.Source, error) {
	out := map[string]*replica.Source{}
	for _, d := range st.Disks() {
		if n == 0 || d.First > n {
			continue
		}
		s, err := w.r.SourceAt(ctx, n, d.ID)
		if err != nil {
			return nil, fmt.Errorf("open disk %s at manifest %d: %w", d.ID, n, err)
		}
		out[d.ID] = s
	}
	return out, nil
}

// window compares one window and commits what differs.
func (w *run) window(ctx context.Context, client changetrackerv1.ChangeTrackerServiceClient, target *replica.Source, v window) error {
	p, _, err := w.progress(ctx)
	if err != nil {
		return err
	}
	if !slices.Contains(p.Missing, v.index) {
		return nil // another worker on the same task was first; it says so
	}
	source := &shipping.Source{
		Client: client, VM: w.vm, Lineage: w.t.GetLineage(), Disk: v.disk.ID, Size: v.disk.Size,
		Resumes: w.config.StreamResumes, Wait: w.config.ResumeWait, MaxWait: w.config.ResumeWaitMax, Idle: w.config.StreamIdle,
		OnResume: func(err error) {
			w.metrics.resumed(ctx)
			w.logger.WarnContext(ctx, "stream broke and is resumed", "disk", v.disk.ID, "error", err)
		},
	}
	sums := newDigests(v.Range, w.chunk)
	err = source.Hashes(ctx, v.Range, w.chunk, func(d shipping.Digests) error {
		sums.set(d.Offset, d.Chunks, d.Sums)
		return nil
	})
	if err != nil {
		return err
	}
	differing, err := w.judge(ctx, target, sums)
	if err != nil {
		return err
	}
	w.metrics.compared(ctx, v.Len, differing.Bytes())
	packed, err := w.fetch(ctx, source, v, differing)
	for range maxDamaged {
		if !errors.Is(err, shipping.ErrDamaged) || ctx.Err() != nil {
			break
		}
		w.metrics.resumed(ctx)
		w.logger.WarnContext(ctx, "data was damaged on its way from the host, the window is read again", "disk", v.disk.ID, "error", err)
		packed, err = w.fetch(ctx, source, v, differing)
	}
	if err != nil {
		return err
	}
	disk := v.disk
	disk.Segments = packed.Segments
	res, err := w.commit(ctx, replica.Proposal{Pass: w.partial(v.index), Disks: []replica.Disk{disk}})
	if err != nil {
		return err
	}
	d := done{seq: res.Seq, index: v.index, tasks: w.tasks(), covered: v.Len, stored: packed.Stored, differing: differing.Bytes()}
	return w.say(ctx, d)
}

// judge returns the chunks in which the target differs from the digests.
func (w *run) judge(ctx context.Context, target *replica.Source, sums *digests) (*extent.Set, error) {
	var present extent.Set
	if target != nil {
		ectx, cancel := context.WithTimeout(ctx, w.config.StorageTimeout)
		defer cancel()
		for r, err := range target.Extents(ectx, sums.window.Off, sums.window.Len) {
			if err != nil {
				return nil, fmt.Errorf("list the replica's ranges: %w", err)
			}
			present.Add(r)
		}
	}
	var (
		mu     sync.Mutex
		out    extent.Set
		differ = func(i int64) {
			mu.Lock()
			defer mu.Unlock()
			out.Add(sums.at(i))
		}
	)
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(w.config.HashWorkers)
	buffers := sync.Pool{New: func() any { b := make([]byte, readBytes); return &b }}
	for first, end := range sums.jobs(&present, readBytes, differ) {
		group.Go(func() error {
			buf := buffers.Get().(*[]byte)
			defer buffers.Put(buf)
			span := extent.Span(sums.at(first).Off, sums.at(end-1).End())
			p := (*buf)[:span.Len]
			rctx, cancel := context.WithTimeout(gctx, w.config.StorageTimeout)
			defer cancel()
			if err := target.ReadAt(rctx, p, span.Off); err != nil {
				return fmt.Errorf("read the replica at %d: %w", span.Off, err)
			}
			for i := first; i < end; i++ {
				c := sums.at(i)
				chunk := p[c.Off-span.Off:][:c.Len]
				if sums.zero[i] && !allZero(chunk) || !sums.zero[i] && sha256.Sum256(chunk) != sums.sum(i) {
					differ(i)
				}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return &out, nil
}

var zeros [4096]byte

func allZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeros))
		if !bytes.Equal(p[:n], zeros[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}

// fetch reads what differs from the host, live, into segments.
func (w *run) fetch(ctx context.Context, source *shipping.Source, v window, differing *extent.Set) (shipping.Packed, error) {
	packer := shipping.NewPacker(w.pool, shipping.PackOptions{
		Key: replica.SegmentKey{Kind: replica.KindPartial, Ordinal: w.pass(), Tx: replica.NewTx(), DiskID: v.disk.ID},
		Header: segment.Header{
			Lineage: w.r.Lineage().Bytes(), DiskID: v.disk.ID, Gen: v.disk.Gen, DiskSize: v.disk.Size,
			Kind: segment.KindPass, Ordinal: w.t.GetPass(), Task: v.index,
		},
		Codec: w.codec, Put: w.putSegment,
	})
	defer packer.Abort()
	var ranges []extent.Range
	flush := func() error {
		if len(ranges) == 0 {
			return nil
		}
		err := source.Ranges(ctx, w.t.GetPass(), v.Range, ranges, func(r shipping.Run) error { return packer.Add(ctx, r) })
		ranges = ranges[:0]
		return err
	}
	for r := range differing.All() {
		if ranges = append(ranges, r); len(ranges) == maxRanges {
			if err := flush(); err != nil {
				return shipping.Packed{}, err
			}
		}
	}
	if err := flush(); err != nil {
		return shipping.Packed{}, err
	}
	return packer.Finish(ctx)
}

func (w *run) putSegment(ctx context.Context, key replica.SegmentKey, body []byte, sha [32]byte) (replica.Segment, error) {
	if err := failpoint.Hit(fpBeforeSegment); err != nil {
		return replica.Segment{}, err
	}
	// Waiting for our own share of the link is not storage's time.
	ctx, cancel := pacing.Timeout(bandwidth.With(ctx, bandwidth.Resync), w.config.StorageTimeout)
	defer cancel()
	seg, err := w.r.PutSegment(ctx, key, body, sha)
	if err != nil {
		return seg, err
	}
	return seg, failpoint.Hit(fpAfterSegment)
}

// traceparent is the context's span for the manifest.
func traceparent(ctx context.Context) string {
	if !trace.SpanContextFromContext(ctx).IsValid() {
		return ""
	}
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	return carrier["traceparent"]
}
