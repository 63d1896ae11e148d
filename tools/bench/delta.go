package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"

	"github.com/landfall-dr/landfall/tools/nbdclient"
)

// The writes of the row dl-coal.
const (
	hotBlocks   = 1000
	rewrites    = 10
	coalDisk    = 256 * mib
	shortPolicy = "name: bench\ncopy_interval: 2s\n"
)

// coalescing writes a thousand scattered blocks of 4 KiB ten times between two points.
func coalescing(_ context.Context, o *Options) ([]subject, error) {
	return []subject{{
		name: fmt.Sprintf("landfall up, %d blocks x %d", hotBlocks, rewrites), check: "test failover, " + compared,
		run: func(ctx context.Context, folder string) (sample, error) { return coalesce(ctx, o, folder) },
	}}, nil
}

func coalesce(ctx context.Context, o *Options, folder string) (sample, error) {
	d, err := makeDisk(filepath.Join(folder, "source.raw"), coalDisk, o.Seed)
	if err != nil {
		return sample{}, err
	}
	p, err := startProduct(ctx, o.Bin, folder, d.path, shortPolicy)
	if err != nil {
		return sample{}, err
	}
	defer p.kill()
	if err := p.cli(ctx, nil, "protect", machine, "--policy", "bench", "--wait"); err != nil {
		return sample{}, err
	}
	// No point is cut while replication is paused; changes are tracked all the same.
	if err := p.cli(ctx, nil, "pause", machine); err != nil {
		return sample{}, err
	}
	var lineage string
	err = p.until(ctx, func() (bool, error) {
		state, l, err := p.protectionState(ctx)
		lineage = l
		return state == "PROTECTION_STATE_PAUSED", errors.Join(err, fmt.Errorf("state %s", state))
	})
	if err != nil {
		return sample{}, err
	}
	before, err := p.points(ctx)
	if err != nil || len(before) == 0 {
		return sample{}, errors.Join(err, errors.New("a protected machine has no point"))
	}
	if err := rewrite(ctx, p, o.Seed); err != nil {
		return sample{}, err
	}
	begin := p.mark()
	if err := p.cli(ctx, nil, "resume", machine); err != nil {
		return sample{}, err
	}
	err = p.until(ctx, func() (bool, error) {
		list, err := p.points(ctx)
		return err == nil && len(list) > 0 && list[0].Ordinal > before[0].Ordinal, errors.Join(err, errors.New("no new point"))
	})
	if err != nil {
		return sample{}, err
	}
	took := p.since(begin)
	if _, err := p.drill(ctx, d.path); err != nil {
		return sample{}, err
	}
	all, err := p.end()
	if err != nil {
		return sample{}, err
	}
	took.peak = all.peak
	got, err := p.segments(ctx, lineage, before[0].Ordinal)
	if err != nil {
		return sample{}, err
	}
	const written, distinct = hotBlocks * rewrites * page, hotBlocks * page
	return sample{usage: took, in: written, out: got.stored, figures: []figure{
		{name: "DL-COAL (shipped / written)", unit: "x", value: float64(got.stored) / written, most: 1.05 / rewrites},
		{name: "shipped / distinct", unit: "x", value: float64(got.stored) / distinct, most: 1.05},
	}}, nil
}

// rewrite writes every block ten times over NBD, each time with other random bytes and in another order.
func rewrite(ctx context.Context, p *product, seed uint64) (err error) {
	uri, err := p.export(ctx)
	if err != nil {
		return err
	}
	c, err := nbdclient.Dial(ctx, uri)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	r := rand.New(rand.NewPCG(seed, 99))
	var place [hotBlocks]int64
	const room = coalDisk / page / hotBlocks
	for i := range place {
		place[i] = (int64(i)*room + r.Int64N(room)) * page
	}
	buf := make([]byte, page)
	for range rewrites {
		for _, i := range r.Perm(hotBlocks) {
			for b := range buf {
				buf[b] = byte(r.Uint32())
			}
			if _, err := c.WriteAt(buf, place[i]); err != nil {
				return fmt.Errorf("write block %d: %w", i, err)
			}
		}
	}
	return c.Flush()
}
