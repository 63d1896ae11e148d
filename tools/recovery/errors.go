package recovery

import (
	"context"
	"encoding/json"
	"errors"
	"io"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/storagereason"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	failoverorchestrator "github.com/landfall-dr/landfall/services/failover-orchestrator"
)

// chainError gives an error of a lineage its reason. What a newer program wrote is told apart from damage.
func (s *Session) chainError(ctx context.Context, lineage replica.Lineage, err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, replica.ErrCorrupt) || errors.Is(err, replica.ErrInvalid) {
		if what, v, known := s.newer(ctx, lineage); what != "" {
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_FORMAT_NEWER, "%s of lineage %s is of format version %d, this program reads %d", what, lineage, v, known).With("lineage", string(lineage))
		}
	}
	return failoverorchestrator.ChainError(err, format, args...)
}

// newer finds what in a lineage is of a version that this program does not know; "" when nothing is.
func (s *Session) newer(ctx context.Context, lineage replica.Lineage) (what string, version, known int) {
	last := ""
	journal := s.store.Container(lineage.JournalContainer())
	for p, err := range journal.List(ctx, "log/", "") {
		if err != nil {
			return "", 0, 0
		}
		last = p.Name
	}
	for _, o := range []struct {
		c     blobstore.Container
		name  string
		known int
		what  string
	}{
		{journal, last, replica.ManifestVersion, "the newest manifest"},
		{s.store.Container(lineage.ReplicaContainer()), "retention.json", replica.RetentionVersion, "the retention record"},
	} {
		if o.name == "" {
			continue
		}
		if v := versionOf(ctx, o.c, o.name); v > o.known {
			return o.what, v, o.known
		}
	}
	return "", 0, 0
}

// versionOf is the member "v" of a stored object; 0 when that cannot be read.
func versionOf(ctx context.Context, c blobstore.Container, name string) int {
	rc, _, err := c.Get(ctx, name, 0, -1)
	if err != nil {
		return 0
	}
	defer rc.Close()
	raw, err := io.ReadAll(io.LimitReader(rc, replica.MaxManifest))
	if err != nil {
		return 0
	}
	var head struct{ V int }
	if json.Unmarshal(raw, &head) != nil {
		return 0
	}
	return head.V
}

// storeError gives an error of looking through the store its reason.
func storeError(err error, format string, args ...any) error {
	return storagereason.Wrap(err, format, args...)
}

// reasonText is one line about an error: its reason and what happened.
func reasonText(err error) string {
	return errcat.Code(errcat.Reason(err)) + ": " + err.Error()
}
