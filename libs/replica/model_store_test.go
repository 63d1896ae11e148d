package replica

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
)

// lateStore lies between an actor's Faulty and the memory store. It notes what changed, so that the checks look only
// there, and lets the effect of a call happen later, when the world says so: a request that was still on the wire
// when its sender gave up. In some runs its journal is write-once.
type lateStore struct {
	blobstore.Store
	w     *world
	actor *actor
}

func (s lateStore) Container(name string) blobstore.Container {
	return lateContainer{s.Store.Container(name), s.w, s.actor, name == testLineage.JournalContainer()}
}

type lateContainer struct {
	blobstore.Container
	w       *world
	actor   *actor
	journal bool
}

// change runs a mutation now, or queues it and loses the answer.
func (c lateContainer) change(name string, call func() error) error {
	do := func() error {
		err := call()
		c.w.touched[name] = true
		return err
	}
	if c.actor.late {
		c.actor.late = false
		c.w.late = append(c.w.late, func() { _ = do() }) // nobody hears it
		return fmt.Errorf("%s: %w", name, blobstoretest.ErrInjected)
	}
	return do()
}

func (c lateContainer) Put(ctx context.Context, name string, body io.ReadSeeker, size int64, cond blobstore.Conditions) (p blobstore.Properties, err error) {
	b, err := io.ReadAll(body)
	if err != nil {
		return p, err
	}
	err = c.change(name, func() (err error) {
		p, err = c.Container.Put(ctx, name, bytes.NewReader(b), size, cond)
		c.sawPut(name, err)
		return err
	})
	return p, err
}

// sawPut counts what a put met.
func (c lateContainer) sawPut(name string, err error) {
	seq, manifest := seqOfName(name, logPrefix)
	switch {
	case manifest && errors.Is(err, blobstore.ErrExists):
		c.w.hit("R7 conflict at h+1")
	case manifest && err == nil && seq <= c.w.check.head:
		c.w.hit("R8 a sleeper refilled a deleted number")
		c.w.check.refilled(seq)
	case name == retentionName && errors.Is(err, blobstore.ErrConditionFailed):
		c.w.hit("R24 the record changed under a writer")
	case strings.HasPrefix(name, ckptPrefix) && errors.Is(err, blobstore.ErrExists):
		c.w.hit("R22 two checkpointers of one manifest")
	}
}

func (c lateContainer) CreatePages(ctx context.Context, name string, size int64, metadata map[string]string, cond blobstore.Conditions) (p blobstore.Properties, err error) {
	err = c.change(name, func() (err error) {
		p, err = c.Container.CreatePages(ctx, name, size, metadata, cond)
		return err
	})
	return p, err
}

func (c lateContainer) WritePages(ctx context.Context, name string, off int64, data []byte, cond blobstore.Conditions) (p blobstore.Properties, err error) {
	if c.actor.late {
		data = bytes.Clone(data)
	}
	cond = ownSequence(cond)
	err = c.change(name, func() (err error) {
		p, err = c.Container.WritePages(ctx, name, off, data, cond)
		c.sawPages(err)
		return err
	})
	return p, err
}

func (c lateContainer) sawPages(err error) {
	if errors.Is(err, blobstore.ErrLeaseConflict) {
		c.w.hit("R20 a page write of a lost lease is refused")
	}
	if errors.Is(err, blobstore.ErrConditionFailed) {
		c.w.hit("R20 a page write under another number is refused")
	}
}

func (c lateContainer) ClearPages(ctx context.Context, name string, off, length int64, cond blobstore.Conditions) (p blobstore.Properties, err error) {
	cond = ownSequence(cond)
	err = c.change(name, func() (err error) {
		p, err = c.Container.ClearPages(ctx, name, off, length, cond)
		c.sawPages(err)
		return err
	})
	return p, err
}

// ownSequence keeps what the condition says now: the caller may change its number before a late effect.
func ownSequence(cond blobstore.Conditions) blobstore.Conditions {
	if cond.IfSequence != nil {
		n := *cond.IfSequence
		cond.IfSequence = &n
	}
	return cond
}

func (c lateContainer) SetSequence(ctx context.Context, name string, n int64, cond blobstore.Conditions) (p blobstore.Properties, err error) {
	err = c.change(name, func() (err error) {
		p, err = c.Container.SetSequence(ctx, name, n, cond)
		if errors.Is(err, blobstore.ErrLeaseConflict) {
			c.w.hit("R21 a number under a lost lease is refused")
		}
		return err
	})
	return p, err
}

func (c lateContainer) SnapshotPages(ctx context.Context, name string, metadata map[string]string, cond blobstore.Conditions) (id blobstore.SnapshotID, p blobstore.Properties, err error) {
	err = c.change(name, func() (err error) {
		id, p, err = c.Container.SnapshotPages(ctx, name, metadata, cond)
		if errors.Is(err, blobstore.ErrConditionFailed) {
			c.w.hit("R22 a disk moved between look and snapshot")
		}
		return err
	})
	return id, p, err
}

// Delete in a write-once journal is refused until the clock has passed.
func (c lateContainer) Delete(ctx context.Context, name string, cond blobstore.Conditions) error {
	return c.change(name, func() error {
		if c.journal && c.w.rates.writeOnce > 0 {
			p, err := c.Container.Stat(ctx, name, "")
			if err != nil {
				return err
			}
			if now, _ := c.w.mem.Now(ctx); now.Before(p.LastModified.Add(c.w.rates.writeOnce)) {
				c.w.hit("R24 write-once refuses a delete")
				return fmt.Errorf("delete %s: %w", name, blobstore.ErrWriteOnce)
			}
		}
		err := c.Container.Delete(ctx, name, cond)
		if err == nil {
			c.w.check.deleted(c.Name(), name)
		}
		return err
	})
}

func (c lateContainer) DeleteSnapshot(ctx context.Context, name string, snapshot blobstore.SnapshotID) error {
	return c.change(name, func() error {
		p, _ := c.Container.Stat(ctx, name, snapshot)
		err := c.Container.DeleteSnapshot(ctx, name, snapshot)
		if err == nil {
			c.w.check.deletedSnapshot(name, snapshot, p.Metadata["seq"])
		}
		return err
	})
}

func (c lateContainer) AcquireLease(ctx context.Context, name string, id blobstore.LeaseID, d time.Duration) error {
	return c.change(name, func() error {
		err := c.Container.AcquireLease(ctx, name, id, d)
		if err == nil && c.w.others(c.actor) {
			c.w.hit("R21 a lease taken while another applier is alive")
		}
		return err
	})
}

func (c lateContainer) BreakLease(ctx context.Context, name string) error {
	return c.change(name, func() error { return c.Container.BreakLease(ctx, name) })
}

// canBeLate says which calls lateStore knows how to delay.
func canBeLate(op blobstoretest.Op) bool {
	switch op {
	case blobstoretest.OpPut, blobstoretest.OpWritePages, blobstoretest.OpClearPages, blobstoretest.OpSetSequence, blobstoretest.OpDelete,
		blobstoretest.OpDeleteSnapshot, blobstoretest.OpSnapshotPages, blobstoretest.OpAcquireLease, blobstoretest.OpBreakLease:
		return true
	}
	return false
}
