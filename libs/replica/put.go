package replica

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/failpoint"
)

// MaxConfig bounds a stored VM configuration, in bytes.
const MaxConfig = 1 << 20

type pendingPut struct {
	c    blobstore.Container
	name string
	body []byte
}

// PutSegment stores a finished segment (the body and hash of segment.Writer.Finish) and returns what a manifest
// lists. When it returns nil the segment is durable. The body is not kept. After an error, ship the task again
// under a new Tx, or call again with the same arguments.
func (r *Replica) PutSegment(ctx context.Context, key SegmentKey, body []byte, sha [32]byte) (Segment, error) {
	seg := Segment{Name: key.name(), Container: key.container(), Bytes: int64(len(body)), SHA256: hex.EncodeToString(sha[:])}
	if !validSegmentName(seg.Name) || len(body) == 0 || len(body) > 64<<20 {
		return Segment{}, fmt.Errorf("put segment %s of %d bytes: %w", seg.Name, len(body), ErrInvalid)
	}
	if err := failpoint.Hit(fpBeforeSegment); err != nil {
		return Segment{}, err
	}
	c := r.container(seg.Container)
	if r.bugs.ManifestBeforeSegments {
		r.pending = append(r.pending, pendingPut{c, seg.Name, bytes.Clone(body)})
		return seg, nil
	}
	if err := putOnce(ctx, c, seg.Name, body, sha); err != nil {
		return Segment{}, fmt.Errorf("put segment: %w", err)
	}
	return seg, failpoint.Hit(fpAfterSegment)
}

// PutConfig stores a VM configuration under its own hash, which it returns for Proposal.Config. Storing the same
// again is success without a transfer.
func (r *Replica) PutConfig(ctx context.Context, config []byte) (string, error) {
	if len(config) == 0 || len(config) > MaxConfig {
		return "", fmt.Errorf("put config of %d bytes: %w", len(config), ErrInvalid)
	}
	sha := sha256.Sum256(config)
	id := hex.EncodeToString(sha[:])
	if err := putOnce(ctx, r.journal, configName(id), config, sha); err != nil {
		return "", fmt.Errorf("put config: %w", err)
	}
	return id, nil
}

// Config reads a stored configuration and verifies its hash.
func (r *Replica) Config(ctx context.Context, id string) ([]byte, error) {
	if !isHex(id, 64) {
		return nil, fmt.Errorf("read config %q: %w", id, ErrInvalid)
	}
	b, err := readAll(ctx, r.journal, configName(id), MaxConfig)
	if err != nil {
		return nil, fmt.Errorf("read config: %w", err)
	}
	if hashHex(b) != id {
		return nil, fmt.Errorf("read config %s: content has another hash: %w", id, ErrCorrupt)
	}
	return b, nil
}

// putOnce creates an object whose name belongs to this content. A name that exists is compared: our own lost
// answer, or the same configuration.
func putOnce(ctx context.Context, c blobstore.Container, name string, body []byte, sha [32]byte) error {
	var err error
	for range maxUnknown {
		_, err = c.Put(ctx, name, bytes.NewReader(body), int64(len(body)), blobstore.Conditions{CreateOnly: true})
		if err == nil {
			return nil
		}
		if definite(err) && !errors.Is(err, blobstore.ErrExists) {
			return err
		}
		have, rerr := readAll(ctx, c, name, int64(len(body)))
		switch {
		case rerr == nil && sha256.Sum256(have) == sha:
			return nil
		case rerr == nil, errors.Is(rerr, ErrCorrupt):
			return fmt.Errorf("%s exists with other content: %w", name, ErrCorrupt)
		case !errors.Is(rerr, blobstore.ErrNotFound):
			return fmt.Errorf("%w: %w; read back: %w", ErrUnknownOutcome, err, rerr)
		}
	}
	return fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
}

// putPending is the planted bug "manifest before segments".
func (r *Replica) putPending(ctx context.Context) error {
	for _, p := range r.pending {
		if err := putOnce(ctx, p.c, p.name, p.body, sha256.Sum256(p.body)); err != nil {
			return err
		}
	}
	r.pending = nil
	return nil
}

func (r *Replica) container(c Container) blobstore.Container {
	if c == Staging {
		return r.staging
	}
	return r.journal
}
