package cli

import (
	"container/list"
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/extent"
	nbd "github.com/landfall-dr/landfall/libs/nbd/server"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	failoverorchestrator "github.com/landfall-dr/landfall/services/failover-orchestrator"
)

// Bounds of serving a point. Reads are cached in blocks, which are fetched in runs: a run is only as long as what was asked
// for, or reaches to the end of its unit where the disk is read in sequence.
const (
	pointBlock = 64 << 10
	pointUnit  = failoverorchestrator.MaxPointRead
	// pointAhead is how far ahead of a sequential reader is fetched, in bytes.
	pointAhead = 4 * pointUnit
	// pointStep is how much of a long request is fetched at once, in bytes.
	pointStep = 4 * pointUnit
	// pointFetches is how many fetches run at once, of all disks.
	pointFetches = 8
	// pointCache bounds what is kept of all disks, in bytes.
	pointCache = 64 << 20
	// mapWindow is how much of a disk one entry of the map's cache tells about, in bytes; mapWindows how many there are.
	mapWindow  = 1 << 30
	mapWindows = 64
	// firstPause and lastPause are the pauses between tries to reach what does not answer.
	firstPause = 100 * time.Millisecond
	lastPause  = 2 * time.Second
)

// pointExport serves an opened point. Its context is that of the command.
type pointExport struct {
	ctx      context.Context //nolint:containedctx // fetches are shared by requests, and outlive the one that began them
	reader   pointReader
	patience time.Duration // how long a read waits for what does not answer
	trouble  func(err error)
	slots    chan struct{}
	running  sync.WaitGroup

	mu      sync.Mutex
	fetched *list.List // of *pointFetch that are done, most recently used first
	bytes   int64      // of fetched
	windows *list.List // of *pointWindow, likewise
}

func newPointExport(ctx context.Context, r pointReader, patience time.Duration, trouble func(error)) *pointExport {
	return &pointExport{ctx: ctx, reader: r, patience: patience, trouble: trouble, slots: make(chan struct{}, pointFetches), fetched: list.New(), windows: list.New()}
}

// wait ends when nothing is fetched any more. Its context must have ended.
func (x *pointExport) wait() { x.running.Wait() }

// try calls do until it works, fails for good, or patience is over.
func (x *pointExport) try(do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(x.ctx, x.patience)
	defer cancel()
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		err := do(ctx)
		switch {
		case err == nil:
			x.trouble(nil)
			return nil
		case x.ctx.Err() != nil:
			return fmt.Errorf("%w: %w", nbd.ErrStopping, x.ctx.Err())
		case errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_SESSION_NOT_FOUND):
			// It ended while nothing answered: the point is still there if retention has not taken it.
			if rerr := x.reader.renew(ctx); rerr != nil && !passing(rerr) {
				return rerr
			}
		case !passing(err):
			return err
		}
		x.trouble(err)
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			if x.ctx.Err() != nil {
				return fmt.Errorf("%w: %w", nbd.ErrStopping, x.ctx.Err())
			}
			return fmt.Errorf("tried for %s: %w", x.patience, err)
		}
	}
}

// pointDisk is one disk of the point, for the NBD server.
type pointDisk struct {
	x    *pointExport
	id   string
	size int64

	// Guarded by x.mu.
	blocks map[int64]*pointFetch
	maps   map[int64]*pointWindow
}

var (
	_ nbd.Disk      = (*pointDisk)(nil)
	_ nbd.Allocator = (*pointDisk)(nil)
)

func (x *pointExport) disk(id string, size int64) *pointDisk {
	return &pointDisk{x: x, id: id, size: size, blocks: map[int64]*pointFetch{}, maps: map[int64]*pointWindow{}}
}

// pointFetch is a run of blocks, fetched or being fetched. data, zero and err are set before done is closed.
type pointFetch struct {
	d     *pointDisk
	at    extent.Range
	done  chan struct{}
	data  []byte
	zero  bool
	err   error
	place *list.Element // in fetched; guarded by x.mu
}

// Size of the disk.
func (d *pointDisk) Size() int64 { return d.size }

// ReadAt reads from the cache and fetches what is not there.
func (d *pointDisk) ReadAt(ctx context.Context, p []byte, off int64) error {
	for len(p) > 0 {
		n := min(int64(len(p)), pointStep-off%pointStep)
		for _, f := range d.want(extent.Range{Off: off, Len: n}) {
			select {
			case <-f.done:
			case <-ctx.Done():
				return ctx.Err()
			}
			if f.err != nil {
				return f.err
			}
			part := f.at.Intersect(extent.Range{Off: off, Len: n})
			q := p[part.Off-off:][:part.Len]
			if f.zero {
				clear(q)
			} else {
				copy(q, f.data[part.Off-f.at.Off:])
			}
		}
		p, off = p[n:], off+n
	}
	return nil
}

// want returns the fetches that cover a range, in order, and begins those that are missing.
func (d *pointDisk) want(r extent.Range) (out []*pointFetch) {
	d.x.mu.Lock()
	defer d.x.mu.Unlock()
	first := r.Off / pointBlock
	follows := d.blocks[first-1] != nil && (first < 4 || d.blocks[first-4] != nil) // 256 KiB before it were read
	units := follows || r.Len >= 4*pointBlock
	for at := r.Off; at < r.End(); {
		f := d.blocks[at/pointBlock]
		if f == nil {
			end := r.End()
			if units {
				end = (at/pointUnit + 1) * pointUnit
			}
			f = d.begin(at, end)
		} else if f.place != nil {
			d.x.fetched.MoveToFront(f.place)
		}
		out = append(out, f)
		at = f.at.End()
	}
	if follows {
		for at := out[len(out)-1].at.End(); at < min(d.size, r.End()+pointAhead); {
			f := d.blocks[at/pointBlock]
			if f == nil {
				if d.hole(at) {
					break
				}
				f = d.begin(at, (at/pointUnit+1)*pointUnit)
			}
			at = f.at.End()
		}
	}
	return out
}

// begin fetches from the block of at up to the block of end, no further than its unit and what is there already. The caller
// holds mu.
func (d *pointDisk) begin(at, end int64) *pointFetch {
	at = at / pointBlock * pointBlock
	end = min((end+pointBlock-1)/pointBlock*pointBlock, (at/pointUnit+1)*pointUnit, d.size)
	f := &pointFetch{d: d, at: extent.Range{Off: at, Len: end - at}, done: make(chan struct{})}
	for b := at; b < end; b += pointBlock {
		if d.blocks[b/pointBlock] != nil {
			f.at.Len = b - at
			break
		}
		d.blocks[b/pointBlock] = f
	}
	d.x.running.Go(f.run)
	return f
}

func (f *pointFetch) run() {
	x := f.d.x
	select {
	case x.slots <- struct{}{}:
		data := make([]byte, f.at.Len)
		f.err = x.try(func(ctx context.Context) (err error) {
			f.zero, err = x.reader.read(ctx, f.d.id, f.at.Off, data)
			return err
		})
		if f.err == nil && !f.zero {
			f.data = data
		}
		<-x.slots
	case <-x.ctx.Done():
		f.err = fmt.Errorf("%w: %w", nbd.ErrStopping, x.ctx.Err())
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if f.err != nil {
		f.forget()
	} else {
		f.place = x.fetched.PushFront(f)
		for x.bytes += f.cost(); x.bytes > pointCache; {
			old := x.fetched.Remove(x.fetched.Back()).(*pointFetch)
			old.place = nil
			old.forget()
			x.bytes -= old.cost()
		}
	}
	close(f.done)
}

// cost is what a fetch takes in the cache.
func (f *pointFetch) cost() int64 { return int64(len(f.data)) + 1024 }

func (f *pointFetch) forget() {
	for b := f.at.Off / pointBlock; b*pointBlock < f.at.End(); b++ {
		if f.d.blocks[b] == f {
			delete(f.d.blocks, b)
		}
	}
}

// pointWindow is a part of a disk's map. set and err are set before done is closed.
type pointWindow struct {
	d     *pointDisk
	index int64
	done  chan struct{}
	set   *extent.Set
	err   error
	place *list.Element
}

// hole says that the map is known there and has nothing. The caller holds mu.
func (d *pointDisk) hole(at int64) bool {
	w := d.maps[at/mapWindow]
	if w == nil {
		return false
	}
	select {
	case <-w.done:
		return w.err == nil && !w.set.Overlaps(extent.Range{Off: at, Len: pointUnit - at%pointUnit})
	default:
		return false
	}
}

// Allocated returns the parts of r that may hold data.
func (d *pointDisk) Allocated(ctx context.Context, r extent.Range) (*extent.Set, error) {
	out := &extent.Set{}
	for i := r.Off / mapWindow; i*mapWindow < r.End(); i++ {
		w := d.window(i)
		select {
		case <-w.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if w.err != nil {
			return nil, w.err
		}
		for e := range w.set.In(r) {
			out.Add(e)
		}
	}
	return out, nil
}

func (d *pointDisk) window(i int64) *pointWindow {
	x := d.x
	x.mu.Lock()
	defer x.mu.Unlock()
	w := d.maps[i]
	if w != nil {
		x.windows.MoveToFront(w.place)
		return w
	}
	w = &pointWindow{d: d, index: i, done: make(chan struct{})}
	d.maps[i], w.place = w, x.windows.PushFront(w)
	for x.windows.Len() > mapWindows {
		old := x.windows.Remove(x.windows.Back()).(*pointWindow)
		delete(old.d.maps, old.index)
	}
	x.running.Go(w.run)
	return w
}

func (w *pointWindow) run() {
	d := w.d
	set := &extent.Set{}
	at := extent.Range{Off: w.index * mapWindow, Len: min(mapWindow, d.size-w.index*mapWindow)}
	for at.Len > 0 && w.err == nil {
		w.err = d.x.try(func(ctx context.Context) error {
			parts, next, err := d.x.reader.mapped(ctx, d.id, at)
			if err != nil {
				return err
			}
			for _, e := range parts {
				set.Add(e.Intersect(at))
			}
			next = min(next, at.End())
			at = extent.Span(next, at.End())
			return nil
		})
	}
	w.set = set
	close(w.done)
	if w.err != nil { // the next one asks again
		d.x.mu.Lock()
		if d.maps[w.index] == w {
			delete(d.maps, w.index)
			d.x.windows.Remove(w.place)
		}
		d.x.mu.Unlock()
	}
}
