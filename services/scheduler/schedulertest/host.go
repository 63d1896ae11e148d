package schedulertest

import (
	"maps"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/errcat"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// BlockSize is the unit in which the guest writes, in bytes.
const BlockSize = 1 << 20

// Block is one block of one disk.
type Block struct {
	Disk  string
	Index int64
}

// Image is what disks hold: the number of the write that a block has; absent is zero.
type Image map[Block]uint64

// Host is one host with one machine. Its methods may be called from any goroutine.
type Host struct {
	hostproviderv1.UnimplementedHostServiceServer

	mu       sync.Mutex
	name     string
	machine  *typesv1.Machine
	findings []*hostproviderv1.Finding
	fail     func(method string) error
	calls    map[string]int

	lineage string
	epoch   uint64
	base    uint64
	highest uint64
	resync  typesv1.ResyncReason

	live   Image
	writes uint64
	log    map[Block]bool // written since the last cut, data logged
	dirty  map[Block]bool // dirty without data
	open   *open
	points []*typesv1.HostPoint
	closed map[uint64]typesv1.SettleOutcome
	cuts   map[uint64]Image // disks at each cut, for ever

	power
	app AppMode
}

type open struct {
	point  *typesv1.HostPoint
	delta  Image          // of a cut
	ranges map[Block]bool // of a pass

	lost        bool // what covers the writes since a pass began is gone
	consistency typesv1.Consistency
	degraded    *typesv1.ErrorDetail
}

// NewHost returns a host of a site with one machine of two disks of eight blocks each.
func NewHost(site, host, vm, display string) *Host {
	return &Host{
		name: "sites/" + site + "/hosts/" + host,
		machine: &typesv1.Machine{
			Name: "sites/" + site + "/vms/" + vm, Id: vm, DisplayName: display, Generation: 2, Cpus: 2, MemoryBytes: 1 << 30,
			Host: "sites/" + site + "/hosts/" + host,
			Disks: []*typesv1.Disk{
				{Id: "os", SizeBytes: 8 * BlockSize, OsDisk: true, Format: typesv1.DiskFormat_DISK_FORMAT_RAW},
				{Id: "data", SizeBytes: 8 * BlockSize, Format: typesv1.DiskFormat_DISK_FORMAT_RAW},
			},
		},
		calls: map[string]int{}, live: Image{}, log: map[Block]bool{}, dirty: map[Block]bool{},
		closed: map[uint64]typesv1.SettleOutcome{}, cuts: map[uint64]Image{},
	}
}

// Record is the host as it registers itself.
func (h *Host) Record() *hostproviderv1.Host {
	return &hostproviderv1.Host{Name: h.name, Driver: "fake", Vms: []string{h.machine.GetId()}, HeartbeatTime: timestamppb.Now()}
}

// Fail makes calls fail: f is asked before each call, and what it returns is the answer. Nil heals.
func (h *Host) Fail(f func(method string) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fail = f
}

// SetFindings makes CheckPrerequisites report them.
func (h *Host) SetFindings(f ...*hostproviderv1.Finding) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.findings = f
}

// Calls is how often a method was called.
func (h *Host) Calls(method string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.calls[method]
}

// Write writes blocks as the guest.
func (h *Host) Write(blocks ...Block) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.off {
		return
	}
	for _, b := range blocks {
		h.writes++
		h.live[b] = h.writes
		if h.lineage != "" {
			h.log[b] = true
		}
	}
}

// Crash is a crash of the host: the data of the unsealed log is not trusted any more.
func (h *Host) Crash() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for b := range h.log {
		h.dirty[b] = true
	}
	clear(h.log)
}

// LoseBaseline has the host demand a resynchronisation.
func (h *Host) LoseBaseline(r typesv1.ResyncReason) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.resync = r
}

// LoseState forgets the protection, as a reinstalled host does.
func (h *Host) LoseState() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.forgetLocked()
}

func (h *Host) forgetLocked() {
	h.lineage, h.epoch, h.base, h.highest, h.open, h.points, h.resync = "", 0, 0, 0, nil, nil, 0 // the fence stays
	clear(h.log)
	clear(h.dirty)
	clear(h.closed)
}

// Backup copies the host as a backup of its whole volume would: disks and tracking. What it returns puts the copy back.
func (h *Host) Backup() (restore func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	lineage, epoch, base, highest, resync := h.lineage, h.epoch, h.base, h.highest, h.resync
	live, log, dirty, closed := maps.Clone(h.live), maps.Clone(h.log), maps.Clone(h.dirty), maps.Clone(h.closed)
	var points []*typesv1.HostPoint
	for _, p := range h.points {
		points = append(points, proto.Clone(p).(*typesv1.HostPoint))
	}
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.lineage, h.epoch, h.base, h.highest, h.resync, h.open = lineage, epoch, base, highest, resync, nil
		h.live, h.log, h.dirty, h.closed, h.points = live, log, dirty, closed, points
	}
}

// OpenStranger cuts a point that no scheduler asked for, as one that lost its records would have.
func (h *Host) OpenStranger(ordinal uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.cutLocked(ordinal)
}

// Status is what the host holds.
func (h *Host) Status() *typesv1.TrackingStatus {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.statusLocked()
}

// Cuts returns the disks at every cut so far.
func (h *Host) Cuts() map[uint64]Image {
	h.mu.Lock()
	defer h.mu.Unlock()
	return maps.Clone(h.cuts)
}

// Live returns the disks as the guest sees them.
func (h *Host) Live() Image {
	h.mu.Lock()
	defer h.mu.Unlock()
	return maps.Clone(h.live)
}

// Changes returns what an open point holds, as ReadChanges would stream it.
func (h *Host) Changes(ordinal uint64) (Image, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.open == nil || h.open.point.GetOrdinal() != ordinal || h.open.point.GetPass() {
		return nil, refuse(typesv1.ErrorReason_ERROR_REASON_POINT_NOT_CUT, "point %d is not open", ordinal)
	}
	return maps.Clone(h.open.delta), nil
}

// Range reads a window of an open pass live, as ReadRanges would.
func (h *Host) Range(pass uint64, disk string, window *typesv1.ByteRange) (Image, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.open != nil && h.open.lost && h.exportGone != 0 {
		return nil, refuse(h.exportGone, "the export of disk %s is gone", disk)
	}
	if h.open == nil || h.open.point.GetOrdinal() != pass || !h.open.point.GetPass() {
		return nil, refuse(typesv1.ErrorReason_ERROR_REASON_PASS_NOT_OPEN, "pass %d is not open", pass)
	}
	out := Image{}
	for b := range h.open.ranges {
		if b.Disk == disk && b.Index*BlockSize >= window.GetOffset() && b.Index*BlockSize < window.GetOffset()+window.GetLength() {
			out[b] = h.live[b]
		}
	}
	return out, nil
}

func refuse(reason typesv1.ErrorReason, format string, args ...any) error {
	return errcat.New(reason, format, args...)
}

// enter counts a call and asks the fault script; it needs the lock.
func (h *Host) enter(method string) error {
	h.calls[method]++
	if h.fail != nil {
		return h.fail(method)
	}
	return nil
}

// allow checks lineage and epoch, and takes a higher epoch over.
func (h *Host) allow(vm, lineage string, epoch uint64) error {
	switch {
	case vm != h.machine.GetId():
		return refuse(typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, "no machine %q", vm)
	case h.lineage == "":
		return refuse(typesv1.ErrorReason_ERROR_REASON_TRACKING_NOT_STARTED, "%s is not tracked", vm)
	case h.lineage != lineage:
		return refuse(typesv1.ErrorReason_ERROR_REASON_LINEAGE_MISMATCH, "tracked for %s", h.lineage)
	case epoch < h.epoch:
		return refuse(typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH, "epoch %d is below %d", epoch, h.epoch)
	}
	h.epoch = epoch
	return nil
}

func (h *Host) statusLocked() *typesv1.TrackingStatus {
	if h.lineage == "" {
		return &typesv1.TrackingStatus{}
	}
	s := &typesv1.TrackingStatus{
		Tracking: true, Lineage: h.lineage, Epoch: h.epoch, Base: h.base, HighestOrdinal: h.highest,
		ResyncReason: h.resync, PassRequired: len(h.dirty) > 0,
	}
	for _, p := range h.points[max(0, len(h.points)-8):] {
		s.Points = append(s.Points, proto.Clone(p).(*typesv1.HostPoint))
	}
	return s
}

// sizes are the disks with what blocks hold of each.
func (h *Host) sizes(blocks map[Block]bool) []*typesv1.DiskChange {
	var out []*typesv1.DiskChange
	for _, d := range h.machine.GetDisks() {
		c := &typesv1.DiskChange{Disk: d.GetId(), SizeBytes: d.GetSizeBytes()}
		for b := range blocks {
			if b.Disk == d.GetId() {
				c.ChangeBytes += BlockSize
			}
		}
		out = append(out, c)
	}
	return out
}

// admit is what a cut and a pass have in common: again is the point that a repeat gets.
func (h *Host) admit(ordinal uint64) (again *typesv1.HostPoint, err error) {
	if h.open != nil && h.open.point.GetOrdinal() == ordinal {
		return h.open.point, nil
	}
	if _, ok := h.closed[ordinal]; ok {
		return nil, refuse(typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED, "ordinal %d is settled", ordinal)
	}
	if h.open != nil {
		return nil, refuse(typesv1.ErrorReason_ERROR_REASON_POINT_OPEN, "ordinal %d is open", h.open.point.GetOrdinal())
	}
	return nil, nil
}

func (h *Host) cutLocked(ordinal uint64) *typesv1.HostPoint {
	delta, blocks := Image{}, map[Block]bool{}
	for b := range h.log {
		delta[b], blocks[b] = h.live[b], true
	}
	clear(h.log)
	p := &typesv1.HostPoint{
		Ordinal: ordinal, Phase: typesv1.PointPhase_POINT_PHASE_OPEN, Base: h.base, CutTime: timestamppb.New(time.Now()),
		Epoch: h.epoch, Disks: h.sizes(blocks),
	}
	h.open = &open{point: p, delta: delta}
	h.points = append(h.points, p)
	h.highest = max(h.highest, ordinal)
	h.cuts[ordinal] = maps.Clone(h.live)
	return p
}

// settle ends an ordinal. The first settle wins; one of an ordinal never seen forbids it.
func (h *Host) settle(ordinal uint64, outcome typesv1.SettleOutcome) error {
	if was, ok := h.closed[ordinal]; ok {
		if was != outcome {
			return refuse(typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED, "ordinal %d was settled %s", ordinal, was)
		}
		return nil
	}
	h.highest = max(h.highest, ordinal)
	if h.open == nil || h.open.point.GetOrdinal() != ordinal {
		h.closed[ordinal] = typesv1.SettleOutcome_SETTLE_OUTCOME_ABANDONED
		if outcome == typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED {
			return refuse(typesv1.ErrorReason_ERROR_REASON_POINT_NOT_CUT, "ordinal %d was never cut", ordinal)
		}
		return nil
	}
	o := h.open
	if o.lost && o.point.GetPass() && outcome == typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED {
		return refuse(typesv1.ErrorReason_ERROR_REASON_BITMAP_LOST, "the bitmap of pass %d is gone", ordinal)
	}
	h.closed[ordinal], h.open = outcome, nil
	if o.lost {
		h.base = 0
	}
	committed := outcome == typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED
	o.point.Phase = typesv1.PointPhase_POINT_PHASE_ABANDONED
	if committed {
		o.point.Phase, h.base = typesv1.PointPhase_POINT_PHASE_COMMITTED, ordinal
	}
	switch {
	case committed && o.point.GetPass() && o.point.GetScope() != typesv1.PassScope_PASS_SCOPE_DIRTY:
		h.resync = typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED
	case committed:
	case o.point.GetPass():
		for b := range o.ranges {
			h.dirty[b] = true
		}
	default:
		for b := range o.delta {
			h.log[b] = true
		}
	}
	return nil
}

// RaiseEpoch makes the host refuse lower epochs, as after a scheduler that had seen more.
func (h *Host) RaiseEpoch(epoch uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.epoch = epoch
}
