package bandwidth

import (
	"context"
	"fmt"
	"io"

	"github.com/landfall-dr/landfall/libs/bandwidth/pacing"
	"github.com/landfall-dr/landfall/libs/blobstore"
)

// Store returns inner with puts that go no faster than l allows. Only puts whose context says what they are for ([With])
// are held back: manifests, configurations and everything else that is small goes at once. What counts is what is read to be
// sent, so a put that a backend repeats counts again. Optional interfaces of inner stay.
func Store(inner blobstore.Store, l *Limiter) blobstore.Store {
	s := &store{inner, l}
	cost, hasCost := inner.(blobstore.RequestCost)
	protector, hasProtector := inner.(blobstore.Protector)
	inspector, hasInspector := inner.(blobstore.Inspector)
	switch {
	case hasCost && hasProtector && hasInspector:
		return struct {
			*store
			blobstore.RequestCost
			blobstore.Protector
			blobstore.Inspector
		}{s, cost, protector, inspector}
	case hasCost && hasProtector:
		return struct {
			*store
			blobstore.RequestCost
			blobstore.Protector
		}{s, cost, protector}
	case hasCost && hasInspector:
		return struct {
			*store
			blobstore.RequestCost
			blobstore.Inspector
		}{s, cost, inspector}
	case hasProtector && hasInspector:
		return struct {
			*store
			blobstore.Protector
			blobstore.Inspector
		}{s, protector, inspector}
	case hasCost:
		return struct {
			*store
			blobstore.RequestCost
		}{s, cost}
	case hasProtector:
		return struct {
			*store
			blobstore.Protector
		}{s, protector}
	case hasInspector:
		return struct {
			*store
			blobstore.Inspector
		}{s, inspector}
	}
	return s
}

type store struct {
	blobstore.Store
	limiter *Limiter
}

// Container returns a handle whose puts are held back.
func (s *store) Container(name string) blobstore.Container {
	return container{s.Store.Container(name), s.limiter}
}

type container struct {
	blobstore.Container
	limiter *Limiter
}

// Put sends the body at the pace of the context's class.
func (c container) Put(ctx context.Context, name string, body io.ReadSeeker, size int64, cond blobstore.Conditions) (blobstore.Properties, error) {
	class, ok := From(ctx)
	if !ok {
		return c.Container.Put(ctx, name, body, size, cond)
	}
	at, err := body.Seek(0, io.SeekCurrent)
	if err != nil {
		return blobstore.Properties{}, fmt.Errorf("put %s/%s: body: %w", c.Name(), name, err)
	}
	defer c.limiter.Begin(class)()
	ctx = pacing.Context(ctx)
	return c.Container.Put(ctx, name, &paced{body: body, ctx: ctx, class: class, limiter: c.limiter, at: at, end: at + size}, size, cond)
}

// paced is a body that waits for its turn at each step.
type paced struct {
	body    io.ReadSeeker
	ctx     context.Context //nolint:containedctx // readers have none of their own, and this one lives as long as its call
	class   Class
	limiter *Limiter
	at, end int64 // position, and the one that the backend has no reason to read beyond
}

// Read is that of io.Reader.
func (p *paced) Read(b []byte) (int, error) {
	want := int(min(int64(min(len(b), p.limiter.Step())), p.end-p.at))
	if want <= 0 {
		return p.body.Read(b)
	}
	if err := p.limiter.Wait(p.ctx, p.class, want); err != nil {
		return 0, err
	}
	n, err := p.body.Read(b[:want])
	p.limiter.Return(p.class, want-n)
	p.at += int64(n)
	return n, err
}

// Seek is that of io.Seeker.
func (p *paced) Seek(offset int64, whence int) (int64, error) {
	at, err := p.body.Seek(offset, whence)
	if err == nil {
		p.at = at
	}
	return at, err
}

// Free is the body without waits; see pacing.Body.
func (p *paced) Free() io.ReadSeeker { return p.body }
