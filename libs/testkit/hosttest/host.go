package hosttest

import (
	"fmt"
	"sync"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/extent"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Message is one message of a bulk stream, as the hook sees it before it is sent.
type Message struct {
	// Method is "ReadChanges", "ReadRanges" or "HashRanges".
	Method string
	// Disk is the disk's id.
	Disk string
	// Offset is where the message begins on the disk; -1 when the stream opens.
	Offset int64
	// Data may be damaged in place; it is the message's own copy.
	Data []byte
}

// Host has one machine. Its methods may be called from any goroutine.
type Host struct {
	changetrackerv1.UnimplementedChangeTrackerServiceServer

	vm, lineage string
	order       []string
	// ChunkBytes is the most data of one message; set it before serving. Default 256 KiB.
	ChunkBytes int64

	mu      sync.Mutex
	live    map[string]*Image
	dirty   map[string]*extent.Set // written since the newest cut or begun pass
	base    uint64
	points  map[uint64]*point
	pass    *pass
	hook    func(Message) error
	streams int
}

type point struct {
	base    uint64
	images  map[string]*Image
	changes map[string]*extent.Set
	settled bool
}

type pass struct {
	ordinal uint64
	scope   typesv1.PassScope
	ranges  map[string]*extent.Set
}

// NewHost returns a host with no disks. vm is the machine's bare id, as calls to the tracker name it.
func NewHost(vm, lineage string) *Host {
	return &Host{
		vm: vm, lineage: lineage, ChunkBytes: 256 << 10, live: map[string]*Image{},
		dirty: map[string]*extent.Set{}, points: map[uint64]*point{},
	}
}

// AddDisk gives the machine a disk.
func (h *Host) AddDisk(id string, image *Image) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.order = append(h.order, id)
	h.live[id], h.dirty[id] = image, &extent.Set{}
}

// Disks returns the disks as a task names them, in order.
func (h *Host) Disks() []*typesv1.Disk {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []*typesv1.Disk
	for i, id := range h.order {
		out = append(out, &typesv1.Disk{Id: id, SizeBytes: h.live[id].Size(), Format: typesv1.DiskFormat_DISK_FORMAT_RAW, OsDisk: i == 0})
	}
	return out
}

// SetHook installs the hook; nil removes it. It runs in the stream's goroutine: what it returns ends the stream.
func (h *Host) SetHook(hook func(Message) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.hook = hook
}

// Streams returns how many bulk streams were opened.
func (h *Host) Streams() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.streams
}

// Write writes as a guest.
func (h *Host) Write(disk string, off int64, p []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.live[disk].WriteAt(p, off)
	h.dirty[disk].Add(extent.Range{Off: off, Len: int64(len(p))})
}

// Zero discards as a guest.
func (h *Host) Zero(disk string, off, n int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.live[disk].Zero(off, n)
	h.dirty[disk].Add(extent.Range{Off: off, Len: n})
}

// ZeroUntracked discards behind the tracker's back.
func (h *Host) ZeroUntracked(disk string, off, n int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.live[disk].Zero(off, n)
}

// WriteUntracked changes a disk behind the tracker's back, for tests of resynchronisation.
func (h *Host) WriteUntracked(disk string, off int64, p []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.live[disk].WriteAt(p, off)
}

// Live returns the image that the guest sees.
func (h *Host) Live(disk string) *Image {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.live[disk]
}

// Cut fixes one instant across all disks and returns the base. A repeat answers again.
func (h *Host) Cut(ordinal uint64) (base uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p, ok := h.points[ordinal]; ok {
		return p.base
	}
	p := &point{base: h.base, images: map[string]*Image{}, changes: map[string]*extent.Set{}}
	for _, id := range h.order {
		p.images[id], p.changes[id] = h.live[id].Freeze(), h.dirty[id]
		h.dirty[id] = &extent.Set{}
	}
	h.points[ordinal] = p
	return p.base
}

// At returns a disk as it was at a cut; it is kept for ever.
func (h *Host) At(ordinal uint64, disk string) *Image {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p, ok := h.points[ordinal]; ok {
		return p.images[disk]
	}
	panic(fmt.Sprintf("hosttest: point %d was never cut", ordinal))
}

// Changes returns what a cut point holds of a disk.
func (h *Host) Changes(ordinal uint64, disk string) *extent.Set {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.points[ordinal].changes[disk]
}

// SettlePoint ends a point. COMMITTED makes it the base, ABANDONED gives its changes to the next one.
func (h *Host) SettlePoint(ordinal uint64, outcome typesv1.SettleOutcome) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p, ok := h.points[ordinal]
	if !ok || p.settled {
		return
	}
	p.settled = true
	if outcome == typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED {
		h.base = ordinal
		return
	}
	for id, set := range p.changes {
		h.dirty[id].AddSet(set)
	}
}

// StartPass opens a pass and returns its base. FULL takes the allocated space and forgets older changes, DIRTY takes
// what was written since the newest cut, COMPARE takes nothing. everything makes FULL take whole disks.
func (h *Host) StartPass(ordinal uint64, scope typesv1.PassScope, everything bool) (base uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.pass = &pass{ordinal: ordinal, scope: scope, ranges: map[string]*extent.Set{}}
	for _, id := range h.order {
		var set *extent.Set
		switch {
		case scope == typesv1.PassScope_PASS_SCOPE_COMPARE:
			set = &extent.Set{}
		case scope == typesv1.PassScope_PASS_SCOPE_DIRTY:
			set = h.dirty[id]
		case everything:
			set = extent.NewSet(extent.Range{Len: h.live[id].Size()})
		default:
			set = h.live[id].Allocated()
		}
		h.pass.ranges[id], h.dirty[id] = set, &extent.Set{}
	}
	if scope == typesv1.PassScope_PASS_SCOPE_DIRTY {
		return h.base
	}
	return 0
}

// EndPass ends the open pass. ABANDONED makes its ranges dirty again.
func (h *Host) EndPass(ordinal uint64, outcome typesv1.SettleOutcome) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.pass == nil || h.pass.ordinal != ordinal {
		return
	}
	if outcome == typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED {
		h.base = ordinal
	} else {
		for id, set := range h.pass.ranges {
			h.dirty[id].AddSet(set)
		}
	}
	h.pass = nil
}

// open checks what every stream names and counts the stream.
func (h *Host) open(vm, lineage, disk string) (*Image, error) {
	h.streams++
	if vm != h.vm {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, "no machine %q here", vm)
	}
	if lineage != h.lineage {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_LINEAGE_MISMATCH, "lineage %s, tracked is %s", lineage, h.lineage)
	}
	image, ok := h.live[disk]
	if !ok {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_DISK_NOT_FOUND, "no disk %q", disk)
	}
	return image, nil
}
