package changetracker

import (
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/services/change-tracker/internal/sidecar"
)

// mode says how the changes of a disk are kept.
type mode int32

const (
	// off: there is no baseline to keep changes against.
	off mode = iota
	// logging: every change is in the chain of logs.
	logging
	// degraded: changes are Dirty marks.
	degraded
)

// share of a disk that its logs may take, in percent (design section 5).
const (
	logLimit      = 50
	logWarnSecond = 40
	logWarnFirst  = 25
)

// disk is one exported disk. As a guestDisk it is what the NBD server exports.
type disk struct {
	m      *machine
	id     string
	path   string // of the image, as given
	dir    string // of the image
	prefix string // of all files of the disk in dir
	format Format
	// identity is equal for two paths of one image.
	identity string
	img      image
	size     int64

	// table is nil when tracking was never started or the sidecar is lost. It changes only with the machine's gate
	// held; a writer keeps the one it heated.
	table  atomic.Pointer[sidecar.Table]
	mode   atomic.Int32
	ranges rangeLock
	flush  flusher

	logMu    sync.Mutex
	active   *logFile   // not nil while logging
	pending  []*logFile // sealed, older, of no open point
	gen      uint64     // of the newest log
	coolGen  uint64     // logs up to here hold no extent hot
	limbo    bool       // logs are in neither the chain nor a durable record: nothing may be cooled
	number   int        // of the newest log's file
	logBytes int64      // data in active and pending
	transit  int64      // data in the logs of the open point
	warned   int        // percentage last warned of
}

func (d *disk) getMode() mode { return mode(d.mode.Load()) }

// Size is the size that the guest sees, in bytes.
func (d *disk) Size() int64 { return d.size }

// ReadAt reads from the image.
func (d *disk) ReadAt(p []byte, off int64) (int, error) { return d.img.ReadAt(p, off) }

// Allocated returns the parts of r that may hold something other than zero.
func (d *disk) Allocated(r extent.Range) (*extent.Set, error) { return d.img.Allocated(r) }

// FastZero reports whether zeroing costs less than writing zeros.
func (d *disk) FastZero() bool { return punchesHoles }

// Flush makes every write that returned before durable.
func (d *disk) Flush() error {
	t := d.table.Load()
	if t == nil {
		return d.sync()
	}
	token := t.FlushBegins()
	if err := d.sync(); err != nil {
		return err
	}
	t.FlushEnds(token)
	return nil
}

// sync flushes the image. The kernel tells of lost data once, to whoever asks first, and then calls the pages clean: so
// after one failure all fail until the image is attached again, and the baseline is lost.
func (d *disk) sync() error {
	err := d.flush.do(d.img.Sync)
	if err != nil && d.m.rec.Load() != nil {
		d.m.fail(fmt.Errorf("disk %s: flush of the image failed: %w", d.id, err))
	}
	return err
}

// flusher lets those who wait for a flush share the next one, and remembers a failure for ever.
type flusher struct {
	mu             sync.Mutex
	cond           *sync.Cond
	running        bool
	begun, flushed uint64
	err            error
}

// do returns when a call of flush that began after do was called has ended.
func (f *flusher) do(flush func() error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cond == nil {
		f.cond = sync.NewCond(&f.mu)
	}
	need := f.begun + 1
	for f.flushed < need && f.err == nil {
		if f.running {
			f.cond.Wait()
			continue
		}
		f.running = true
		f.begun++
		f.mu.Unlock()
		err := flush()
		f.mu.Lock()
		f.running, f.flushed, f.err = false, f.begun, err
		f.cond.Broadcast()
	}
	return f.err
}

// WriteAt writes p at off, durably if fua.
func (d *disk) WriteAt(p []byte, off int64, fua bool) error {
	r := extent.Range{Off: off, Len: int64(len(p))}
	err := d.change(r, func(l *logFile) error { return l.append(off, p) }, func() error {
		n, err := d.img.WriteAt(p, off)
		if err == nil && n < len(p) {
			err = io.ErrShortWrite
		}
		return err
	})
	if err == nil && fua {
		err = d.Flush()
	}
	return err
}

// Zero makes r read as zero, durably if fua. The space is given back unless keep.
func (d *disk) Zero(r extent.Range, keep, fua bool) error {
	err := d.change(r, func(l *logFile) error { return l.appendZero(d.m.t.files, r) }, func() error {
		if !keep {
			return d.img.Zero(r)
		}
		for r := r; r.Len > 0; {
			n := min(r.Len, int64(len(zeroes)))
			if _, err := d.img.WriteAt(zeroes[:n], r.Off); err != nil {
				return err
			}
			r.Off, r.Len = r.Off+n, r.Len-n
		}
		return nil
	})
	if err == nil && fua {
		err = d.Flush()
	}
	return err
}

var zeroes = make([]byte, 1<<20)

// change is the path of every guest write (design.md, "Guest write").
func (d *disk) change(r extent.Range, log func(*logFile) error, apply func() error) error {
	if !r.Valid() || r.End() > d.size {
		return fmt.Errorf("write of [%d, %d) on a disk of %d bytes", r.Off, r.End(), d.size)
	}
	if r.Empty() {
		return nil
	}
	table := d.enter(r)
	defer d.m.gate.RUnlock()
	d.ranges.lock(r)
	defer d.ranges.unlock(r)

	gen := uint64(0)
	if table != nil {
		gen = d.track(table, r, log)
		defer func() { table.Done(r, gen) }()
	}
	err := apply()
	if err != nil && table != nil {
		// Log and image differ now.
		d.degrade("image write: " + err.Error())
		table.Mark(r, sidecar.Dirty)
	}
	return err
}

// enter returns inside the gate, with r hot in the returned table, or with nil if the disk is off.
func (d *disk) enter(r extent.Range) *sidecar.Table {
	for {
		var heated *sidecar.Table
		if d.getMode() != off {
			heated = d.table.Load()
			_ = failpoint.Hit("change-tracker/before-hot")
			if err := heated.Heat(r); err != nil {
				d.m.sidecarFailed(d, err)
			}
			_ = failpoint.Hit("change-tracker/after-hot")
		}
		d.m.gate.RLock()
		if d.getMode() == off {
			if heated != nil {
				heated.Done(r, 0)
			}
			return nil
		}
		if heated != nil && heated == d.table.Load() {
			return heated
		}
		d.m.gate.RUnlock() // tracking began meanwhile
		if heated != nil {
			heated.Done(r, 0)
		}
	}
}

// track logs a change or marks it dirty, and returns the log that holds it. It needs the gate and the range lock.
func (d *disk) track(table *sidecar.Table, r extent.Range, log func(*logFile) error) uint64 {
	d.logMu.Lock()
	defer d.logMu.Unlock()
	if l := d.active; l != nil {
		before := l.data
		why := ""
		switch {
		case (d.logBytes+d.transit+r.Len)*100 > d.size*logLimit && d.m.t.limitLogs:
			why = fmt.Sprintf("logs reached %d %% of the disk", logLimit)
		case d.entries() >= d.m.t.maxEntries:
			why = "logs have too many entries"
		default:
			if err := log(l); err != nil {
				why = "append: " + err.Error()
			}
		}
		if why == "" {
			d.logBytes += l.data - before
			d.warn()
			return l.gen
		}
		d.degradeLocked(why)
	}
	table.Mark(r, sidecar.Dirty)
	return 0
}

// entries counts what the chain holds. It needs logMu.
func (d *disk) entries() int64 {
	n := d.active.rec.Entries + d.active.rec.Zeros
	for _, l := range d.pending {
		n += l.rec.Entries + l.rec.Zeros
	}
	return n
}

// warn says once that the logs passed a share of the disk. It needs logMu.
func (d *disk) warn() {
	share := int((d.logBytes + d.transit) * 100 / d.size)
	level := 0
	if share >= logWarnSecond {
		level = logWarnSecond
	} else if share >= logWarnFirst {
		level = logWarnFirst
	}
	if level > d.warned {
		d.m.t.logger.Warn("logs take a large share of the disk; ship a point or find what writes so much",
			"vm", d.m.id, "disk", d.id, "percent", share, "limit", logLimit)
	}
	d.warned = level
}

// degrade gives up the chain in favour of Dirty marks.
func (d *disk) degrade(why string) {
	d.logMu.Lock()
	defer d.logMu.Unlock()
	d.degradeLocked(why)
}

func (d *disk) degradeLocked(why string) {
	if d.getMode() != logging {
		return
	}
	d.mode.Store(int32(degraded))
	d.m.t.metrics.degraded()
	d.m.t.logger.Warn("log data is given up, changes are kept as dirty extents; the next pass re-reads them",
		"vm", d.m.id, "disk", d.id, "why", why)
	table := d.table.Load()
	for _, l := range d.takeChain() {
		if bits, err := l.extents(d); err == nil {
			table.MarkBits(bits, sidecar.Dirty)
		} else {
			d.m.fail(fmt.Errorf("disk %s: %w", d.id, err))
		}
		d.m.dropLater(l)
	}
	// All is Dirty: no log keeps an extent hot any more.
	d.coolGen = d.gen
}

// takeChain empties the chain and returns it, oldest first. It needs logMu.
func (d *disk) takeChain() []*logFile {
	chain := d.pending
	if d.active != nil {
		chain = append(chain, d.active)
	}
	d.pending, d.active, d.logBytes = nil, nil, 0
	return chain
}

// continues reports whether the chain follows log last without a gap. It needs logMu.
func (d *disk) continues(last logRecord) bool {
	head := d.active
	if len(d.pending) > 0 {
		head = d.pending[0]
	}
	return d.getMode() == logging && head != nil && head.rec.Previous == last.ID
}

// cool takes Hot from the extents whose writes are safe on the image and in a point's record.
func (d *disk) cool() error {
	t := d.table.Load()
	if t == nil {
		return nil
	}
	d.logMu.Lock()
	gen, limbo := d.coolGen, d.limbo
	d.logMu.Unlock()
	if limbo {
		// A disk that degrades meanwhile raises coolGen beyond the logs in limbo. They cool with the next point.
		return nil
	}
	if d.m.t.bugs.coolOnSeal {
		t.CoolUnflushed(gen)
		return t.Commit()
	}
	if err := d.Flush(); err != nil {
		return fmt.Errorf("flush image of %s: %w", d.id, err)
	}
	if t.Cool(gen) == 0 {
		return nil
	}
	return t.Commit()
}

// rangeLock lets writes that do not overlap run in parallel and the others one after another.
type rangeLock struct {
	mu   sync.Mutex
	cond *sync.Cond
	held []extent.Range
}

func (l *rangeLock) lock(r extent.Range) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cond == nil {
		l.cond = sync.NewCond(&l.mu)
	}
	for slices.ContainsFunc(l.held, func(h extent.Range) bool { return !h.Intersect(r).Empty() }) {
		l.cond.Wait()
	}
	l.held = append(l.held, r)
}

func (l *rangeLock) unlock(r extent.Range) {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := slices.Index(l.held, r)
	l.held = slices.Delete(l.held, i, i+1)
	l.cond.Broadcast()
}
