package shipping

import "context"

// bufferSlack is what a segment may grow beyond its target: the last run, index and footer.
const bufferSlack = 2*MaxChunk + 256<<10

// Pool is a fixed number of buffers in which segments are built. Whoever finds none free waits: that is the
// backpressure that keeps a process small. Buffers are made when they are first needed and kept. Safe for concurrent
// use.
type Pool struct {
	slots  chan []byte
	bulk   chan struct{} // one less than slots: what those may take who leave one to others; nil with a single slot
	target int
}

// NewPool returns a pool of n buffers for segments of target stored bytes. n and target are at least 1.
func NewPool(n, target int) *Pool {
	p := &Pool{slots: make(chan []byte, max(n, 1)), target: max(target, 1)}
	for range cap(p.slots) {
		p.slots <- nil
	}
	if n > 1 {
		p.bulk = make(chan struct{}, n-1)
	}
	return p
}

// Target is the stored size of the segments that the buffers are for, in bytes.
func (p *Pool) Target() int { return p.target }

// InUse is how many buffers are taken.
func (p *Pool) InUse() int { return cap(p.slots) - len(p.slots) }

// get waits for a buffer. Every buffer is given back by put, grown or not, with the same bulk: who is, leaves the last buffer
// to who is not.
func (p *Pool) get(ctx context.Context, bulk bool) (_ []byte, err error) {
	if bulk && p.bulk != nil {
		select {
		case p.bulk <- struct{}{}:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		defer func() {
			if err != nil {
				<-p.bulk
			}
		}()
	}
	select {
	case b := <-p.slots:
		if b == nil {
			b = make([]byte, 0, p.target+bufferSlack)
		}
		return b[:0], nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (p *Pool) put(b []byte, bulk bool) {
	p.slots <- b[:0]
	if bulk && p.bulk != nil {
		<-p.bulk
	}
}
