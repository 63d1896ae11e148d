package azure

import (
	"context"
	"maps"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/pageblob"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// callKey is the metadata key that holds the id of the call that made a blob. Callers never see it.
const callKey = "lfcall"

// maxInfos bounds what is remembered of page blobs.
const maxInfos = 4096

// info is what page writes need to know of their blob: fixed at creation, but for sequence, which is a hint.
type info struct {
	size     int64
	metadata map[string]string
	sequence int64
}

// infoCache remembers page blobs by container/name.
type infoCache struct {
	mu sync.Mutex
	m  map[string]info
}

func (c *infoCache) get(key string) (info, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	i, ok := c.m[key]
	return i, ok
}

func (c *infoCache) put(key string, i info) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil {
		c.m = map[string]info{}
	}
	if _, ok := c.m[key]; !ok && len(c.m) >= maxInfos {
		for k := range c.m { // any: it costs one request to know it again
			delete(c.m, k)
			break
		}
	}
	c.m[key] = i
}

func (c *infoCache) sequence(key string, n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if i, ok := c.m[key]; ok {
		i.sequence = n
		c.m[key] = i
	}
}

func (c *infoCache) drop(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.m, key)
}

// tag is the service's ETag without quotes, as lists have it.
func tag(t *azcore.ETag) blobstore.ETag {
	if t == nil {
		return ""
	}
	return blobstore.ETag(strings.Trim(string(*t), `"`))
}

// ifMatch is the header of a condition.
func ifMatch(t blobstore.ETag) *azcore.ETag {
	if t == "" {
		return nil
	}
	q := azcore.ETag(`"` + string(t) + `"`)
	return &q
}

// metadata returns what the caller gave, and the id of the call that made the blob. Keys come back in another case.
func metadata(in map[string]*string) (own map[string]string, id string) {
	for k, v := range in {
		if k = strings.ToLower(k); v == nil {
			continue
		}
		if k == callKey {
			id = *v
			continue
		}
		if own == nil {
			own = map[string]string{}
		}
		own[k] = *v
	}
	return own, id
}

func value[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

func stamp(t *time.Time) time.Time { return value(t).UTC() }

// state is a blob as HEAD shows it.
type state struct {
	blobstore.Properties
	call string
}

// head reads a blob's properties. A lease that is given must be held.
func (c *ctr) head(ctx context.Context, op, name string, snapshot blobstore.SnapshotID, lease blobstore.LeaseID) (state, error) {
	b := c.client.NewBlobClient(name)
	if snapshot != "" {
		s, err := b.WithSnapshot(string(snapshot))
		if err != nil {
			return state{}, c.wrap(op, name, err)
		}
		b = s
	}
	var st state
	_, err := c.s.call(ctx, call{op: op, name: c.key(name), blob: true}, func(ctx context.Context) error {
		r, err := b.GetProperties(ctx, &blob.GetPropertiesOptions{AccessConditions: access(blobstore.Conditions{Lease: lease})})
		if err != nil {
			return err
		}
		md, id := metadata(r.Metadata)
		st = state{call: id, Properties: blobstore.Properties{
			Name: name, Snapshot: snapshot, Size: value(r.ContentLength), ETag: tag(r.ETag), LastModified: stamp(r.LastModified),
			Sequence: value(r.BlobSequenceNumber), IsPages: value(r.BlobType) == blob.BlobTypePageBlob, Metadata: md,
		}}
		return nil
	})
	if err != nil {
		return state{}, err
	}
	if snapshot == "" && st.IsPages {
		c.s.infos.put(c.key(name), info{size: st.Size, metadata: st.Metadata, sequence: st.Sequence})
	}
	return st, nil
}

// pageInfo returns what page writes need to know; ErrInvalid when the blob is no page blob.
func (c *ctr) pageInfo(ctx context.Context, op, name string) (info, error) {
	if i, ok := c.s.infos.get(c.key(name)); ok {
		return i, nil
	}
	st, err := c.head(ctx, op, name, "", "")
	if err != nil {
		return info{}, err
	}
	if !st.IsPages {
		return info{}, c.wrap(op, name, errNoPages)
	}
	return info{size: st.Size, metadata: st.Metadata, sequence: st.Sequence}, nil
}

// forget drops what is known of a blob when an answer says that it is another one than was thought.
func (c *ctr) forget(name string, err error) {
	if code, status := codeOf(err); status == http.StatusNotFound || code == "InvalidBlobType" || code == "InvalidPageRange" || code == "InvalidRange" {
		c.s.infos.drop(c.key(name))
	}
}

// written is what a page write returns.
func (c *ctr) written(name string, i info, e *azcore.ETag, at *time.Time, seq *int64) blobstore.Properties {
	if seq != nil {
		c.s.infos.sequence(c.key(name), *seq)
		i.sequence = *seq
	}
	return blobstore.Properties{
		Name: name, Size: i.size, ETag: tag(e), LastModified: stamp(at), Sequence: i.sequence, IsPages: true, Metadata: maps.Clone(i.metadata),
	}
}

// item is a blob as a list shows it.
func item(b *container.BlobItem) blobstore.Properties {
	p := blobstore.Properties{Name: value(b.Name), Snapshot: blobstore.SnapshotID(value(b.Snapshot))}
	p.Metadata, _ = metadata(b.Metadata)
	if q := b.Properties; q != nil {
		p.Size, p.ETag, p.LastModified = value(q.ContentLength), tag(q.ETag), stamp(q.LastModified)
		p.Sequence, p.IsPages = value(q.BlobSequenceNumber), value(q.BlobType) == blob.BlobTypePageBlob
	}
	return p
}

// access makes the headers of conditions; those of the sequence number are sequence's.
func access(cond blobstore.Conditions) *blob.AccessConditions {
	a := &blob.AccessConditions{}
	if cond.Lease != "" {
		id := string(cond.Lease)
		a.LeaseAccessConditions = &blob.LeaseAccessConditions{LeaseID: &id}
	}
	if cond.CreateOnly || cond.IfMatch != "" {
		a.ModifiedAccessConditions = &blob.ModifiedAccessConditions{IfMatch: ifMatch(cond.IfMatch)}
		if cond.CreateOnly {
			any := azcore.ETagAny
			a.ModifiedAccessConditions.IfNoneMatch = &any
		}
	}
	return a
}

func sequence(cond blobstore.Conditions) *pageblob.SequenceNumberAccessConditions {
	if cond.IfSequence == nil {
		return nil
	}
	return &pageblob.SequenceNumberAccessConditions{IfSequenceNumberEqualTo: cond.IfSequence}
}
