package uploader

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"

	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/bandwidth"
	"github.com/landfall-dr/landfall/libs/bandwidth/pacing"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/segment"
	"github.com/landfall-dr/landfall/libs/shipping"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

// trackerService is the name under which hosts serve their change tracker.
const trackerService = "change-tracker"

// Hosts finds the services of hosts; *rpc.Hosts does.
type Hosts interface {
	Conn(ctx context.Context, host, service string) (grpc.ClientConnInterface, error)
}

// shipper turns ship tasks into manifests.
type shipper struct {
	config   Config
	replicas *replicas
	hosts    Hosts
	pool     *shipping.Pool
	codec    *shipping.Codec
	limiter  *bandwidth.Limiter
	metrics  *metrics
	logger   *slog.Logger
	// damage, in tests, gets every run after it was received. Called by several streams at once.
	damage func(shipping.Run)
}

// maxDamaged is how often a task is read again because data changed between the host's checksum and the segment. More is
// broken memory, which another try here would not heal.
const maxDamaged = 2

// shipped is a task that is in the chain.
type shipped struct {
	manifest *replica.Manifest
	// already: an earlier delivery, or another worker, committed it.
	already bool
	// changed is the length of all runs read; of a point that was committed before, what its manifest says.
	changed int64
}

// stored is the size of the manifest's segments.
func (s *shipped) stored() (n int64) {
	for _, d := range s.manifest.Disks {
		for _, seg := range d.Segments {
			n += seg.Bytes
		}
	}
	return n
}

// ship makes the task durable, or finds that it is. The error is final for the task unless ctx is over or a failpoint
// made it: who may try again is the scheduler's decision.
func (s *shipper) ship(ctx context.Context, t *uploaderv1.ShipTask) (*shipped, error) {
	r, err := s.replicas.get(ctx, t.GetLineage())
	if err != nil {
		return nil, err
	}
	if done, err := s.committed(ctx, r, t); done != nil || err != nil {
		return done, err
	}
	out, err := s.transfer(ctx, r, t)
	if err == nil || ctx.Err() != nil || errors.Is(err, failpoint.ErrInjected) {
		return out, err
	}
	// Another worker may have committed the same task meanwhile, and the host have forgotten it: that is success.
	if done, lookErr := s.committed(ctx, r, t); lookErr == nil && done != nil {
		s.logger.InfoContext(ctx, "another worker was first", "task", describe(t), "error", err)
		return done, nil
	}
	return nil, err
}

// committed looks for the task in the chain. Nil without an error: it is not there.
func (s *shipper) committed(ctx context.Context, r *replica.Replica, t *uploaderv1.ShipTask) (*shipped, error) {
	ctx, cancel := context.WithTimeout(ctx, s.config.StorageTimeout)
	defer cancel()
	st, err := r.Refresh(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the chain: %w", err)
	}
	if p := t.GetPoint(); p != nil {
		seq, ok := st.PointSeq(replica.Ordinal(p.GetOrdinal()))
		if !ok {
			return nil, nil //nolint:nilnil // absence is an answer
		}
		m, err := r.Manifest(ctx, seq)
		if err != nil {
			return nil, fmt.Errorf("read the point's manifest: %w", err)
		}
		out := &shipped{manifest: m, already: true}
		if m.Signals != nil {
			out.changed = m.Signals.Changed
		}
		return out, nil
	}
	p := t.GetPass()
	progress, ok := st.Pass(replica.Ordinal(p.GetOrdinal()))
	if !ok || progress.K != uint32(p.GetTasks()) {
		return nil, nil //nolint:nilnil // absence is an answer
	}
	for _, i := range progress.Missing {
		if i == uint32(p.GetIndex()) {
			return nil, nil //nolint:nilnil // absence is an answer
		}
	}
	m, err := findPartial(ctx, r, progress.Last, replica.Ordinal(p.GetOrdinal()), uint32(p.GetIndex()))
	if err != nil {
		return nil, fmt.Errorf("find task %d of pass %d: %w", p.GetIndex(), p.GetOrdinal(), err)
	}
	if m == nil { // a rewind stands above it; the commit will say so
		return nil, nil //nolint:nilnil // absence is an answer
	}
	return &shipped{manifest: m, already: true}, nil
}

// findPartial walks down from the newest manifest of a pass to the one of task i.
func findPartial(ctx context.Context, r *replica.Replica, from replica.Seq, pass replica.Ordinal, i uint32) (*replica.Manifest, error) {
	for seq := from; seq > 0; seq-- {
		m, err := r.Manifest(ctx, seq)
		if err != nil {
			return nil, err
		}
		switch {
		case m.Pass != nil && m.Pass.Ordinal == pass && m.Pass.I == i:
			return m, nil
		case m.Kind.IsPoint(), m.Kind == replica.KindRewind, m.Pass != nil && m.Pass.Ordinal != pass:
			return nil, nil //nolint:nilnil // below is another run
		}
	}
	return nil, nil //nolint:nilnil // not there
}

// transfer reads the data from the host and commits it.
func (s *shipper) transfer(ctx context.Context, r *replica.Replica, t *uploaderv1.ShipTask) (*shipped, error) {
	fresh, at, err := s.fresh(ctx, r, t)
	if err != nil {
		return nil, err
	}
	for damaged := 0; ; {
		proposal, changed, err := s.pack(ctx, r, t, fresh)
		if errors.Is(err, shipping.ErrDamaged) && damaged < maxDamaged && ctx.Err() == nil {
			damaged++
			s.metrics.resumed(ctx)
			s.logger.WarnContext(ctx, "data was damaged on its way from the host, the task reads it again", "task", describe(t), "error", err)
			continue
		}
		if err != nil {
			return nil, err
		}
		proposal.At = at
		res, err := s.commit(ctx, r, proposal)
		if errors.Is(err, replica.ErrHeadMoved) && at != 0 {
			// Manifest 1 exists now. If it is of this pass, nothing older can follow it any more (rule 10); if
			// not, something lies under our zeros.
			if fresh, at, err = s.fresh(ctx, r, t); err != nil {
				return nil, err
			}
			proposal.At = at
			if fresh {
				res, err = s.commit(ctx, r, proposal)
			} else {
				s.logger.InfoContext(ctx, "an older pass committed first, shipping again with zeros", "task", describe(t))
				continue
			}
		}
		if err != nil {
			return nil, err
		}
		if res.Outcome == replica.AlreadyCommitted {
			return s.mustBeCommitted(ctx, r, t)
		}
		m, err := r.Manifest(ctx, res.Seq)
		if err != nil {
			return nil, fmt.Errorf("read back the manifest: %w", err)
		}
		out := &shipped{manifest: m, changed: changed}
		s.metrics.shipped(ctx, out.stored())
		return out, nil
	}
}

func (s *shipper) mustBeCommitted(ctx context.Context, r *replica.Replica, t *uploaderv1.ShipTask) (*shipped, error) {
	done, err := s.committed(ctx, r, t)
	if err == nil && done == nil {
		err = errcat.New(typesv1.ErrorReason_ERROR_REASON_CHAIN_BROKEN, "%s is committed, but its manifest was not found", describe(t))
	}
	return done, err
}

// fresh tells whether the task may leave zeros out, because nothing but its own pass lies under it, and at which
// number it must commit for that to stay true; 0 is any (design.md, "Zeros").
func (s *shipper) fresh(ctx context.Context, r *replica.Replica, t *uploaderv1.ShipTask) (fresh bool, at replica.Seq, err error) {
	p := t.GetPass()
	if p.GetScope() != typesv1.PassScope_PASS_SCOPE_FULL {
		return false, 0, nil
	}
	ctx, cancel := context.WithTimeout(ctx, s.config.StorageTimeout)
	defer cancel()
	st, err := r.Refresh(ctx)
	switch {
	case err != nil:
		return false, 0, fmt.Errorf("read the chain: %w", err)
	case st.Head == 0:
		return true, 1, nil
	case st.Floor != 0 || st.Highest != replica.Ordinal(p.GetOrdinal()):
		return false, 0, nil
	}
	// Ordinals never fall, so if the first manifest is of the pass with the highest ordinal, all are.
	m, err := r.Manifest(ctx, 1)
	if err != nil {
		return false, 0, fmt.Errorf("read the first manifest: %w", err)
	}
	return m.Ordinal() == st.Highest, 0, nil
}

// pack streams every disk of the task into segments and returns what to commit.
func (s *shipper) pack(ctx context.Context, r *replica.Replica, t *uploaderv1.ShipTask, skipZeros bool) (replica.Proposal, int64, error) {
	p := replica.Proposal{
		Epoch: replica.Epoch(t.GetEpoch()), Open: replica.Seq(t.GetOpen()), Base: replica.Ordinal(t.GetBase()),
		Host: t.GetHost(), Reason: t.GetReason(), Trace: traceparent(ctx),
	}
	disks := t.GetDisks()
	header := segment.Header{Lineage: r.Lineage().Bytes(), Kind: segment.KindPoint}
	if point := t.GetPoint(); point != nil {
		p.Kind, p.Point = replica.KindPoint, replica.Ordinal(point.GetOrdinal())
		if point.GetKind() == typesv1.PointKind_POINT_KIND_BASE {
			p.Kind = replica.KindBase
		}
		p.CutTime, p.Consistency = point.GetCutTime().AsTime(), replica.ConsistencyCrash
		if point.GetConsistency() == typesv1.Consistency_CONSISTENCY_APPLICATION {
			p.Consistency = replica.ConsistencyApp
		}
		header.Ordinal = point.GetOrdinal()
	} else {
		pass := t.GetPass()
		p.Kind = replica.KindPartial
		p.Pass = &replica.Pass{Ordinal: replica.Ordinal(pass.GetOrdinal()), I: uint32(pass.GetIndex()), K: uint32(pass.GetTasks())}
		header.Kind, header.Ordinal, header.Task = segment.KindPass, pass.GetOrdinal(), uint32(pass.GetIndex())
		disks = nil
		for _, d := range t.GetDisks() {
			if d.GetId() == pass.GetDisk() {
				disks = []*typesv1.Disk{d}
			}
		}
		if pass.GetDisk() != "" && disks == nil {
			return p, 0, errcat.New(typesv1.ErrorReason_ERROR_REASON_DISK_NOT_FOUND, "task names disk %q, which is not among the machine's", pass.GetDisk())
		}
	}
	var err error
	if p.Disks, err = s.geometry(ctx, r, disks); err != nil {
		return p, 0, err
	}
	if p.Config, err = s.putConfig(ctx, r, t); err != nil {
		return p, 0, err
	}
	if len(disks) == 0 {
		return p, 0, nil // an empty task of a pass
	}
	client, err := s.tracker(ctx, t.GetHost())
	if err != nil {
		return p, 0, err
	}
	key := replica.SegmentKey{Kind: p.Kind, Ordinal: replica.Ordinal(header.Ordinal), Tx: replica.NewTx()}
	packed := make([]shipping.Packed, len(disks))
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(s.config.Ship.DiskStreams)
	for i := range disks {
		key, header := key, header
		d := &p.Disks[i]
		key.DiskID, header.DiskID, header.Gen, header.DiskSize = d.ID, d.ID, d.Gen, d.Size
		group.Go(func() error {
			var err error
			packed[i], err = s.packDisk(gctx, r, t, client, key, header, skipZeros)
			d.Segments = packed[i].Segments
			return err
		})
	}
	err = group.Wait()
	signals := signalsOf(packed)
	if p.Kind.IsPoint() {
		p.Signals = &signals
	}
	return p, signals.Changed, err
}

// signalsOf says what the changes of all disks looked like.
func signalsOf(packed []shipping.Packed) (s replica.Signals) {
	for _, p := range packed {
		s.Changed += p.Changed
		s.Zero += p.Blank
		s.Stored += p.Stored
		s.Incompressible += p.Incompressible
	}
	s.Incompressible = min(s.Incompressible, s.Changed-s.Zero) // a block may hold some zeros
	return s
}

// geometry is the disks as manifests name them: with the generation that the chain has.
func (s *shipper) geometry(ctx context.Context, r *replica.Replica, disks []*typesv1.Disk) ([]replica.Disk, error) {
	ctx, cancel := context.WithTimeout(ctx, s.config.StorageTimeout)
	defer cancel()
	st, err := r.Refresh(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the chain: %w", err)
	}
	return shipping.Geometry(st, disks)
}

func (s *shipper) packDisk(ctx context.Context, r *replica.Replica, t *uploaderv1.ShipTask, client changetrackerv1.ChangeTrackerServiceClient,
	key replica.SegmentKey, header segment.Header, skipZeros bool,
) (shipping.Packed, error) {
	vm, err := shipping.ParseMachine(t.GetVm())
	if err != nil {
		return shipping.Packed{}, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, err, "read the task")
	}
	ship := s.config.Ship
	source := &shipping.Source{
		Client: client, VM: vm.VM, Lineage: t.GetLineage(), Disk: header.DiskID, Size: header.DiskSize,
		Resumes: ship.StreamResumes, Wait: ship.ResumeWait, MaxWait: ship.ResumeWaitMax, Idle: ship.StreamIdle,
		OnResume: func(err error) {
			s.metrics.resumed(ctx)
			s.logger.WarnContext(ctx, "stream broke and is resumed", "disk", header.DiskID, "error", err)
		},
	}
	packer := shipping.NewPacker(s.pool, shipping.PackOptions{
		Key: key, Header: header, Codec: s.codec, SkipZeros: skipZeros,
		Bulk: classOf(t) != bandwidth.Delta && s.limiter.Rate() > 0,
		Put: func(_ context.Context, key replica.SegmentKey, body []byte, sha [32]byte) (replica.Segment, error) {
			return s.putSegment(bandwidth.With(ctx, classOf(t)), r, key, body, sha)
		},
	})
	defer packer.Abort()
	take := func(run shipping.Run) error {
		if s.damage != nil {
			s.damage(run)
		}
		return packer.Add(ctx, run)
	}
	if point := t.GetPoint(); point != nil {
		err = source.Changes(ctx, point.GetOrdinal(), take)
	} else {
		window := extent.Range{Len: header.DiskSize}
		if w := t.GetPass().GetWindow(); w != nil {
			window = window.Intersect(extent.Range{Off: w.GetOffset(), Len: w.GetLength()})
		}
		err = source.Ranges(ctx, t.GetPass().GetOrdinal(), window, nil, take)
	}
	if err != nil {
		return shipping.Packed{}, err
	}
	return packer.Finish(ctx)
}

// classOf is what a task's bytes are for.
func classOf(t *uploaderv1.ShipTask) bandwidth.Class {
	if t.GetPoint() != nil {
		return bandwidth.Delta
	}
	return bandwidth.Copy
}

func (s *shipper) putSegment(ctx context.Context, r *replica.Replica, key replica.SegmentKey, body []byte, sha [32]byte) (replica.Segment, error) {
	if err := failpoint.Hit(fpBeforeSegment); err != nil {
		return replica.Segment{}, err
	}
	ctx, cancel := pacing.Timeout(ctx, s.config.StorageTimeout) // waiting for our own share is not storage's time
	defer cancel()
	seg, err := r.PutSegment(ctx, key, body, sha)
	if err != nil {
		return seg, err
	}
	s.metrics.segment(ctx, int64(len(body)))
	return seg, failpoint.Hit(fpAfterSegment)
}

// putConfig stores the machine's configuration with a point.
func (s *shipper) putConfig(ctx context.Context, r *replica.Replica, t *uploaderv1.ShipTask) (string, error) {
	if t.GetMachine() == nil || t.GetPoint() == nil {
		return "", nil
	}
	body, err := encodeMachine(t.GetMachine())
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, s.config.StorageTimeout)
	defer cancel()
	id, err := r.PutConfig(ctx, body)
	if err != nil {
		return "", fmt.Errorf("store the configuration: %w", err)
	}
	return id, nil
}

// configVersion leads the stored configuration (docs/formats/config.md).
const configVersion = `{"v":1,`

// encodeMachine writes a machine as proto-JSON with a version, without the white space that the encoder varies on
// purpose, and without what belongs to the moment, so that the same configuration has the same bytes.
func encodeMachine(m *typesv1.Machine) ([]byte, error) {
	m = proto.CloneOf(m)
	for _, d := range m.GetDisks() {
		d.ExportUri = ""
	}
	raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode the configuration: %w", err)
	}
	var out bytes.Buffer
	if err := json.Compact(&out, raw); err != nil {
		return nil, fmt.Errorf("encode the configuration: %w", err)
	}
	if out.Len() <= len("{}") {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "the task's machine is empty")
	}
	return append([]byte(configVersion), out.Bytes()[1:]...), nil
}

func (s *shipper) commit(ctx context.Context, r *replica.Replica, p replica.Proposal) (replica.Result, error) {
	if err := failpoint.Hit(fpBeforeManifest); err != nil {
		return replica.Result{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.config.StorageTimeout)
	defer cancel()
	res, err := r.Commit(ctx, p)
	if err != nil {
		return res, err
	}
	return res, failpoint.Hit(fpAfterManifest)
}

func (s *shipper) tracker(ctx context.Context, host string) (changetrackerv1.ChangeTrackerServiceClient, error) {
	ctx, cancel := context.WithTimeout(ctx, s.config.Ship.HostTimeout)
	defer cancel()
	conn, err := s.hosts.Conn(ctx, shipping.HostID(host), trackerService)
	if err != nil {
		return nil, fmt.Errorf("reach host %s: %w", host, err)
	}
	return changetrackerv1.NewChangeTrackerServiceClient(conn), nil
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

// describe names a task for people.
func describe(t *uploaderv1.ShipTask) string {
	if p := t.GetPass(); p != nil {
		return fmt.Sprintf("pass %d task %d/%d of %s", p.GetOrdinal(), p.GetIndex(), p.GetTasks(), t.GetVm())
	}
	return fmt.Sprintf("point %d of %s", t.GetPoint().GetOrdinal(), t.GetVm())
}
