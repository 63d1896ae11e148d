package replica

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// Backlog is what the replica disks of a lineage lack of its chain: the RTO debt. A failover to a point has to write it.
type Backlog struct {
	// Applied: every disk has taken in the chain up to it. Head is the newest manifest.
	Applied, Head Seq
	// Manifests with data between the two, and the points among them.
	Manifests, Points int
	// Bytes their segments take in storage.
	Bytes int64
	// Requests to page blobs that applying it takes, estimated from what batches of this process took lately.
	Requests int64
	// Drain is how long applying it takes, estimated likewise; from the limits of one page blob before the first batch.
	Drain time.Duration
	// Oldest is the cut time of the oldest point that is not applied; zero when there is none.
	Oldest time.Time
	// DiskBytes is the size of all disks at the head.
	DiskBytes int64
	// Based: the chain has a base. Before that there is no point to fail over to, and what waits is the initial copy.
	Based bool
	// Due: manifests that wait for nobody, because a pass, a rewind or a fence is among them.
	Due bool
}

// Share is the backlog's bytes over those of the disks.
func (b Backlog) Share() float64 {
	if b.DiskBytes == 0 {
		return 0
	}
	return float64(b.Bytes) / float64(b.DiskBytes)
}

// Backlog refreshes, reads the disks' numbers and says what lies between them and the head.
func (r *Replica) Backlog(ctx context.Context) (Backlog, error) {
	if err := r.lock(ctx); err != nil {
		return Backlog{}, err
	}
	defer r.unlock()
	if err := r.refresh(ctx); err != nil {
		return Backlog{}, fmt.Errorf("backlog: %w", err)
	}
	applied, err := r.processed(ctx)
	if err != nil {
		return Backlog{}, fmt.Errorf("backlog: %w", err)
	}
	return r.backlogAbove(applied), nil
}

// BacklogAbove refreshes, and says what lies between a manifest that the caller knows to be applied and the head. It asks
// nothing of the page blobs.
func (r *Replica) BacklogAbove(ctx context.Context, applied Seq) (Backlog, error) {
	if err := r.lock(ctx); err != nil {
		return Backlog{}, err
	}
	defer r.unlock()
	if err := r.refresh(ctx); err != nil {
		return Backlog{}, fmt.Errorf("backlog: %w", err)
	}
	return r.backlogAbove(applied), nil
}

func (r *Replica) backlogAbove(applied Seq) Backlog {
	b := Backlog{Applied: applied, Head: r.chain.state.Head, Based: r.chain.state.Base != 0}
	for _, d := range r.chain.state.Disks() {
		b.DiskBytes += d.Size
	}
	for _, e := range r.chain.entries[r.chain.above(applied):] {
		if !e.Kind.IsPoint() || e.Kind == KindBase {
			b.Due = true
		}
		if e.Kind.IsFence() {
			continue
		}
		b.Manifests++
		b.Bytes += e.Bytes
		if e.Kind.IsPoint() {
			if b.Points++; b.Oldest.IsZero() {
				b.Oldest = e.CutTime
			}
		}
	}
	b.Requests, b.Drain = r.pace.estimate(b.Bytes)
	return b
}

// Limits of one page blob of Azure, for estimates before anything was measured.
const (
	assumedRate       = 60 << 20 // bytes/s
	assumedPerRequest = assumedRate / 500
)

// pace is the smoothed speed of batches: seconds and page requests per stored byte.
type pace struct {
	mu                       sync.Mutex
	bytes, seconds, requests float64 // sums in which older batches weigh less
}

// paceMemory is the stored bytes after which an old observation weighs half.
const paceMemory = 256 << 20

// observe takes one batch in. Small batches weigh little: their time is mostly that of leases and numbers.
func (p *pace) observe(bytes, requests int64, took time.Duration) {
	if bytes <= 0 || took <= 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	keep := 1 / (1 + float64(bytes)/paceMemory)
	p.bytes = p.bytes*keep + float64(bytes)
	p.seconds = p.seconds*keep + took.Seconds()
	p.requests = p.requests*keep + float64(requests)
}

func (p *pace) estimate(bytes int64) (requests int64, took time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bytes < 1<<20 { // too little to go by
		return (bytes + assumedPerRequest - 1) / assumedPerRequest, time.Duration(float64(bytes) / assumedRate * float64(time.Second))
	}
	share := float64(bytes) / p.bytes
	return int64(p.requests*share + 0.5), time.Duration(p.seconds * share * float64(time.Second))
}
