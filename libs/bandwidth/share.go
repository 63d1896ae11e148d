package bandwidth

import (
	"cmp"
	"context"
	"math/bits"
	"slices"

	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

// Class says what bytes are for.
type Class uint8

// The classes. Their numbers are those of TransferClass less one.
const (
	Delta  Class = iota // points: they decide the RPO
	Copy                // initial replication and passes
	Resync              // resynchronisation by comparing
	// Classes is how many there are.
	Classes = 3
)

var classNames = [Classes]string{"delta", "copy", "resync"}

// weights of the classes that have something to send. The smallest is a tenth of all of them, so that nobody starves.
var weights = [Classes]uint64{8, 1, 1}

// String is the class's name in records and metrics.
func (c Class) String() string {
	if int(c) < Classes {
		return classNames[c]
	}
	return uploaderv1.TransferClass_TRANSFER_CLASS_UNSPECIFIED.String()
}

type classKey struct{}

// With says for what a put under ctx is; [Store] limits only puts that say so.
func With(ctx context.Context, c Class) context.Context { return context.WithValue(ctx, classKey{}, c) }

// From is what [With] said; false: nothing.
func From(ctx context.Context) (Class, bool) {
	c, ok := ctx.Value(classKey{}).(Class)
	return c, ok && int(c) < Classes
}

// Demand is how many streams of each class a worker has in progress or waiting.
type Demand struct {
	Worker  string
	Streams [Classes]int
}

// maxStreams is more than any worker has; what a record says beyond it is not believed.
const maxStreams = 10_000

func (d Demand) streams(c int) uint64 { return uint64(min(max(d.Streams[c], 0), maxStreams)) }

// Any reports whether there is any.
func (d Demand) Any() bool { return d.Streams != [Classes]int{} }

// Part is what a worker may send, in bytes a second by class.
type Part [Classes]int64

// Total is what the worker may send at all.
func (p Part) Total() (n int64) {
	for _, c := range p {
		n += c
	}
	return n
}

// Shares divides a rate, in bytes a second, among all who have something to send: 8 to 1 to 1 among the classes that
// have, and within a class by streams. All parts together are at most the rate; with a rate of at least [MinLimit] and no
// more streams than that, whoever has a stream has more than nothing. A worker named twice counts once, as first named.
func Shares(rate int64, demands []Demand) map[string]Part {
	out := make(map[string]Part, len(demands))
	if rate <= 0 {
		return out
	}
	demands = slices.Clone(demands)
	slices.SortStableFunc(demands, func(a, b Demand) int { return cmp.Compare(a.Worker, b.Worker) })
	demands = slices.CompactFunc(demands, func(a, b Demand) bool { return a.Worker == b.Worker })
	var sums [Classes]uint64
	for _, d := range demands {
		for c := range Classes {
			sums[c] += d.streams(c)
		}
	}
	var weight uint64
	for c := range Classes {
		if sums[c] > 0 {
			weight += weights[c]
		}
	}
	for _, d := range demands {
		var p Part
		for c := range Classes {
			if n := d.streams(c); n > 0 {
				p[c] = portion(rate, weights[c]*n, weight*sums[c])
			}
		}
		out[d.Worker] = p
	}
	return out
}

// Share is the part of one worker; see [Shares].
func Share(rate int64, demands []Demand, self string) Part { return Shares(rate, demands)[self] }

// portion is rate*n/of, rounded down; n is at most of.
func portion(rate int64, n, of uint64) int64 {
	hi, lo := bits.Mul64(uint64(rate), n)
	q, _ := bits.Div64(hi, lo, of)
	return int64(q)
}
