package failoverorchestrator

import (
	"context"
	"sync"
	"time"

	"github.com/landfall-dr/landfall/libs/replica"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// progressEvery bounds how often a job's bytes are written to its record.
const progressEvery = 500 * time.Millisecond

// progress is a sink that also counts. Disks come one after the other and are written roughly in ascending order, so
// the end of the furthest write says how much of a disk is done, absent space included.
type progress struct {
	sink   replica.Sink
	report func(*typesv1.JobProgress)
	now    func() time.Time
	total  int64

	mu         sync.Mutex
	last       time.Time
	done, sent int64 // of all disks; bytes written
	high       int64 // of the present disk
}

// Disk implements replica.Sink.
func (p *progress) Disk(ctx context.Context, d replica.DiskState) (replica.DiskSink, error) {
	inner, err := p.sink.Disk(ctx, d)
	if err != nil {
		return nil, err
	}
	return &countedDisk{DiskSink: inner, p: p, size: d.Size}, nil
}

type countedDisk struct {
	replica.DiskSink
	p    *progress
	size int64
}

// WriteAt implements replica.DiskSink.
func (d *countedDisk) WriteAt(ctx context.Context, b []byte, off int64) error {
	if err := d.DiskSink.WriteAt(ctx, b, off); err != nil {
		return err
	}
	d.p.add(func(p *progress) {
		p.sent += int64(len(b))
		p.high = max(p.high, off+int64(len(b)))
	}, false)
	return nil
}

// Finish implements replica.DiskSink.
func (d *countedDisk) Finish(ctx context.Context) error {
	if err := d.DiskSink.Finish(ctx); err != nil {
		return err
	}
	d.p.add(func(p *progress) { p.done, p.high = p.done+d.size, 0 }, true)
	return nil
}

// add counts, and reports if that is due.
func (p *progress) add(count func(*progress), due bool) {
	p.mu.Lock()
	count(p)
	now := p.now()
	if due = due || now.Sub(p.last) >= progressEvery; due {
		p.last = now
	}
	r := &typesv1.JobProgress{TotalBytes: p.total, DoneBytes: p.done + p.high, SentBytes: p.sent}
	p.mu.Unlock()
	if due {
		p.report(r)
	}
}

// reporter writes progress to the job's record; a lost report is no harm, and one that comes late does not count back.
func (s *Service) reporter(ctx context.Context, job string) func(*typesv1.JobProgress) {
	return func(r *typesv1.JobProgress) {
		_, err := s.job(ctx, job, func(j *typesv1.Job) {
			if j.Progress == nil || r.DoneBytes >= j.Progress.DoneBytes {
				j.Progress = r
			}
		})
		if err != nil && ctx.Err() == nil {
			s.log.DebugContext(ctx, "report progress", "job", job, "error", err)
		}
	}
}

// diskBytes is the size of a manifest's disks.
func diskBytes(disks []replica.Disk) (n int64) {
	for _, d := range disks {
		n += d.Size
	}
	return n
}
