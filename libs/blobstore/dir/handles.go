package dir

import (
	"container/list"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// Names inside a page blob's folder and inside a snapshot's.
const (
	dataFile = "data"
	metaFile = "meta.json"
	stateFil = "state"
	snapsDir = "snap"
)

// metaV is the version of meta.json.
const metaV = 1

// pageMeta is meta.json of a page blob or a snapshot; it never changes. The fields after Metadata are a
// snapshot's only: the properties of the blob when it was taken.
type pageMeta struct {
	V           int               `json:"v"`
	Incarnation string            `json:"incarnation"`
	Size        int64             `json:"size"`
	Metadata    map[string]string `json:"metadata,omitempty"`

	Snapshot string         `json:"snapshot,omitempty"`
	ETag     blobstore.ETag `json:"etag,omitempty"`
	Sequence int64          `json:"sequence,omitempty"`
	Modified *time.Time     `json:"modified,omitempty"`
}

// handle is an open page blob (state and counters set) or snapshot.
type handle struct {
	path  string
	data  *os.File
	state *os.File
	count *counters
	meta  pageMeta

	cache *handleCache
	refs  int           // guarded by cache.mu; the cache itself holds one while elem is set
	elem  *list.Element // guarded by cache.mu
}

// handleCache keeps recently used handles open.
type handleCache struct {
	mu     sync.Mutex
	max    int
	open   map[string]*handle
	recent *list.List // front: most recently used
	closed bool
}

func newHandleCache(size int) *handleCache {
	return &handleCache{max: size, open: map[string]*handle{}, recent: list.New()}
}

// get opens the folder of a page blob (live) or a snapshot, or returns it from the cache; fresh tells which.
// The caller puts it back.
func (hc *handleCache) get(path string, live bool) (h *handle, fresh bool, err error) {
	hc.mu.Lock()
	if h, ok := hc.open[path]; ok {
		h.refs++
		hc.recent.MoveToFront(h.elem)
		hc.mu.Unlock()
		return h, false, nil
	}
	hc.mu.Unlock()
	if h, err = openHandle(path, live); err != nil {
		return nil, false, err
	}
	h.cache, h.refs = hc, 1
	var drop []*handle
	hc.mu.Lock()
	if _, dup := hc.open[path]; !dup && !hc.closed { // a duplicate lives for this call only
		h.refs++
		h.elem = hc.recent.PushFront(h)
		hc.open[path] = h
		for hc.recent.Len() > hc.max {
			drop = append(drop, hc.removeLocked(hc.recent.Back().Value.(*handle)))
		}
	}
	hc.mu.Unlock()
	closeAll(drop)
	return h, true, nil
}

// removeLocked takes a handle out of the cache and returns it if nobody uses it.
func (hc *handleCache) removeLocked(h *handle) *handle {
	if h.elem == nil {
		return nil
	}
	hc.recent.Remove(h.elem)
	h.elem = nil
	delete(hc.open, h.path)
	h.refs--
	if h.refs == 0 {
		return h
	}
	return nil
}

func closeAll(hs []*handle) {
	for _, h := range hs {
		if h != nil {
			h.close()
		}
	}
}

// put gives a handle back.
func (h *handle) put() {
	hc := h.cache
	hc.mu.Lock()
	h.refs--
	last := h.refs == 0
	hc.mu.Unlock()
	if last {
		h.close()
	}
}

// forget takes a handle out of the cache: its blob is gone.
func (h *handle) forget() {
	h.cache.mu.Lock()
	idle := h.cache.removeLocked(h)
	h.cache.mu.Unlock()
	closeAll([]*handle{idle})
}

// drop forgets the handle of a path.
func (hc *handleCache) drop(path string) {
	hc.mu.Lock()
	var idle *handle
	if h, ok := hc.open[path]; ok {
		idle = hc.removeLocked(h)
	}
	hc.mu.Unlock()
	closeAll([]*handle{idle})
}

func (hc *handleCache) close() {
	hc.mu.Lock()
	hc.closed = true
	var idle []*handle
	for _, h := range hc.open {
		idle = append(idle, hc.removeLocked(h))
	}
	hc.mu.Unlock()
	closeAll(idle)
}

func openHandle(path string, live bool) (*handle, error) {
	h := &handle{path: path}
	raw, err := os.ReadFile(filepath.Join(path, metaFile))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(raw, &h.meta); err != nil {
		return nil, fmt.Errorf("%s: %w", metaFile, err)
	}
	if h.meta.V != metaV {
		return nil, fmt.Errorf("%w: %s version %d, this program knows %d", blobstore.ErrInvalid, metaFile, h.meta.V, metaV)
	}
	mode := os.O_RDONLY
	if live {
		mode = os.O_RDWR
	}
	if h.data, err = os.OpenFile(filepath.Join(path, dataFile), mode, 0); err != nil {
		return nil, err
	}
	if !live {
		return h, nil
	}
	if h.state, err = os.OpenFile(filepath.Join(path, stateFil), os.O_RDWR, 0); err == nil {
		h.count, err = mapCounters(h.state)
	}
	if err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

func (h *handle) close() {
	var err error
	if h.count != nil {
		err = h.count.close()
	}
	if h.state != nil {
		err = errors.Join(err, h.state.Close())
	}
	err = errors.Join(err, h.data.Close())
	_ = err // nothing was promised about these descriptors
}

// deleted reports whether this incarnation of the blob, or this snapshot, is gone.
func (h *handle) deleted() bool {
	if h.count == nil {
		return gone(h.data)
	}
	v, err := h.count.get(wordDeleted)
	return err == nil && v != 0
}
