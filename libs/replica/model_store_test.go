package replica

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
)

// lateStore lies between an actor's Faulty and the memory store. It notes what changed, so that the checks look only
// there, and lets the effect of a call happen later, when the world says so: a request that was still on the wire
// when its sender gave up.
type lateStore struct {
	blobstore.Store
	w     *world
	actor *actor
}

func (s lateStore) Container(name string) blobstore.Container {
	return lateContainer{s.Store.Container(name), s.w, s.actor}
}

type lateContainer struct {
	blobstore.Container
	w     *world
	actor *actor
}

// change runs a mutation now, or queues it and loses the answer.
func (c lateContainer) change(name string, call func() error) error {
	if c.actor.late {
		c.actor.late = false
		c.w.late = append(c.w.late, func() {
			_ = call() // nobody hears it
			c.w.touched[name] = true
		})
		return fmt.Errorf("%s: %w", name, blobstoretest.ErrInjected)
	}
	err := call()
	c.w.touched[name] = true
	return err
}

func (c lateContainer) Put(ctx context.Context, name string, body io.ReadSeeker, size int64, cond blobstore.Conditions) (p blobstore.Properties, err error) {
	b, err := io.ReadAll(body)
	if err != nil {
		return p, err
	}
	err = c.change(name, func() (err error) {
		p, err = c.Container.Put(ctx, name, bytes.NewReader(b), size, cond)
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
		return err
	})
	return p, err
}

func (c lateContainer) ClearPages(ctx context.Context, name string, off, length int64, cond blobstore.Conditions) (p blobstore.Properties, err error) {
	cond = ownSequence(cond)
	err = c.change(name, func() (err error) {
		p, err = c.Container.ClearPages(ctx, name, off, length, cond)
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
		return err
	})
	return p, err
}

// canBeLate says which calls lateStore knows how to delay.
func canBeLate(op blobstoretest.Op) bool {
	switch op {
	case blobstoretest.OpPut, blobstoretest.OpWritePages, blobstoretest.OpClearPages, blobstoretest.OpSetSequence:
		return true
	}
	return false
}
