package dir

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// errStop ends a walk whose consumer has seen enough.
var errStop = errors.New("stop")

// List walks the folders in name order; it holds the names of one path of folders at a time.
func (c *container) List(ctx context.Context, prefix, after string) iter.Seq2[blobstore.Properties, error] {
	return func(yield func(blobstore.Properties, error) bool) {
		fail := func(err error) { yield(blobstore.Properties{}, c.wrap("list", prefix, err)) }
		if err := c.s.ready(ctx); err != nil {
			fail(err)
			return
		}
		if err := blobstore.CheckContainerName(c.name); err != nil {
			fail(err)
			return
		}
		if _, err := os.Stat(c.path); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				err = fmt.Errorf("%w: %w", blobstore.ErrNoContainer, err)
			}
			fail(err)
			return
		}
		w := walker{c: c, prefix: prefix, after: after, yield: yield}
		// Begin at the deepest folder that holds all names with the prefix.
		start, base := c.path, ""
		if i := strings.LastIndexByte(prefix, '/'); i >= 0 {
			base = prefix[:i+1]
			if blobstore.CheckBlobName(prefix[:i]) != nil {
				return // no blob has such a name
			}
			rel, err := encodeName(prefix[:i])
			if err != nil {
				return
			}
			start = filepath.Join(c.path, rel)
		}
		if err := w.walk(ctx, start, base); err != nil && !errors.Is(err, errStop) {
			fail(err)
		}
	}
}

type walker struct {
	c             *container
	prefix, after string
	yield         func(blobstore.Properties, error) bool
}

// entry is one blob, or one folder (its key ends in '/').
type entry struct {
	key  string
	path string
	kind string // suffix; "" is a folder
}

// walk yields the blobs under one folder, whose names begin with base.
func (w *walker) walk(ctx context.Context, path, base string) error {
	entries, err := w.read(path, base)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := w.c.s.ready(ctx); err != nil {
			return err
		}
		if e.kind == "" {
			if err := w.walk(ctx, e.path, e.key); err != nil {
				return err
			}
			continue
		}
		p, err := w.properties(ctx, e)
		switch {
		case errors.Is(err, fs.ErrNotExist) || errors.Is(err, blobstore.ErrNotFound):
			continue // deleted meanwhile
		case err != nil:
			return fmt.Errorf("%s: %w", e.key, err)
		}
		if !w.yield(p, nil) {
			return errStop
		}
	}
	return nil
}

// read returns the wanted entries of one folder in name order: a folder sorts as its name with a slash,
// which is where all names inside it sort.
func (w *walker) read(path, base string) ([]entry, error) {
	d, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	names, err := d.Readdirnames(-1)
	if err = errors.Join(err, d.Close()); err != nil {
		return nil, err
	}
	var entries []entry
	for _, n := range names {
		enc, kind := n, ""
		if i := strings.IndexByte(n, '@'); i >= 0 {
			enc, kind = n[:i], n[i:]
		}
		dec, ok := decodeSegment(enc)
		if !ok || kind != "" && kind != suffixBlock && kind != suffixPages {
			continue
		}
		e := entry{key: base + dec, path: filepath.Join(path, n), kind: kind}
		if kind == "" {
			e.key += "/"
			if !strings.HasPrefix(e.key, w.prefix) && !strings.HasPrefix(w.prefix, e.key) ||
				e.key < w.after && !strings.HasPrefix(w.after, e.key) {
				continue
			}
		} else if !strings.HasPrefix(e.key, w.prefix) || e.key <= w.after {
			continue
		}
		entries = append(entries, e)
	}
	slices.SortFunc(entries, func(a, b entry) int { return cmp.Compare(a.key, b.key) })
	return entries, nil
}

func (w *walker) properties(ctx context.Context, e entry) (blobstore.Properties, error) {
	if e.kind == suffixPages {
		return w.c.statPages(ctx, ref{e.key, strings.TrimSuffix(e.path, suffixPages)}, "")
	}
	st, err := os.Lstat(e.path)
	if err != nil {
		return blobstore.Properties{}, err
	}
	return blockProps(e.key, st), nil
}
