package scheduler

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// notWriteOnce is the refusal of a protection whose policy demands more than the store enforces.
func notWriteOnce(format string, args ...any) error {
	return errcat.New(typesv1.ErrorReason_ERROR_REASON_STORAGE_NOT_WRITE_ONCE, format, args...)
}

// canBeWriteOnce refuses before anything is made when the store enforces no write-once policy at all.
func (s *Service) canBeWriteOnce(p *schedulerv1.Policy) error {
	want := p.GetWriteOnce().AsDuration()
	if _, ok := s.deps.Store.(blobstore.Protector); ok || want <= 0 {
		return nil
	}
	return notWriteOnce("%s demands write_once %s, and this store enforces no write-once policy on any container: use an account that does, or take write_once out of the policy",
		p.GetName(), want)
}

// writeOnce sees to it that nothing in the journal of the lineage can be overwritten or deleted for as long as the policy
// demands: it accepts the container's own policy, else sets one, else refuses and says what to set.
func (v *vmRun) writeOnce(ctx context.Context) error {
	want := v.policy.GetWriteOnce().AsDuration()
	if want <= 0 {
		return nil
	}
	container := replica.Lineage(v.rec.GetLineage()).JournalContainer()
	protector, ok := v.blobs.(blobstore.Protector)
	if !ok {
		return notWriteOnce("%s demands write_once %s, and this store enforces no write-once policy on any container", v.policy.GetName(), want)
	}
	ctx, cancel := context.WithTimeout(ctx, v.cfg.StorageTimeout)
	defer cancel()
	have, err := protector.ContainerProtection(ctx, container)
	if err != nil {
		return storageError(err, "read the write-once policy of container %s", container)
	}
	if have.WriteOnce >= want {
		return nil
	}
	setErr := protector.ProtectContainer(ctx, container, blobstore.Protection{WriteOnce: want})
	if setErr != nil && !errors.Is(setErr, blobstore.ErrPermission) && !errors.Is(setErr, blobstore.ErrInvalid) {
		return storageError(setErr, "set a write-once policy of %s on container %s", want, container)
	}
	if setErr == nil {
		if have, err = protector.ContainerProtection(ctx, container); err != nil {
			return storageError(err, "read the write-once policy of container %s", container)
		}
		if enough(have, want) {
			return nil
		}
	}
	if have.WriteOnce == anyLength && setErr != nil { // the store says that there is a policy, and not for how long
		v.log.WarnContext(ctx, "journal is write-once, for how long is not known", "vm", v.rec.GetName(), "container", container, "wanted", want)
		return nil
	}
	return notWriteOnce("%s demands write_once %s and container %s has %s: set a time-based retention policy of at least %s on that container%s",
		v.policy.GetName(), want, container, lengthText(have), want, because(setErr))
}

// anyLength is what a store answers that does not say how long its policy is.
const anyLength = time.Nanosecond

func enough(have blobstore.Protection, want time.Duration) bool {
	return have.WriteOnce >= want || have.WriteOnce == anyLength
}

func lengthText(p blobstore.Protection) string {
	switch p.WriteOnce {
	case 0:
		return "none"
	case anyLength:
		return "one of unknown length"
	}
	return p.WriteOnce.String()
}

func because(err error) string {
	if err == nil {
		return ""
	}
	return fmt.Sprintf(" (it could not be set from here: %s)", err)
}
