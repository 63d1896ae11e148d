package storagecheck

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/replica"
)

// trial is one Run.
type trial struct {
	store  blobstore.Store
	o      Options
	rights blobstore.Grants
	tx     string
	report *Report
	made   [][2]string // container and blob
}

// places are the containers and the names in them that rights differ by.
var places = []struct{ what, container, prefix string }{
	{"journal segments", Lineage.JournalContainer(), "seg/"},
	{"journal manifests", Lineage.JournalContainer(), "log/"},
	{"staging", Lineage.StagingContainer(), "seg/"},
	{"replica disks", Lineage.ReplicaContainer(), "disks/"},
	{"checkpoints", Lineage.ReplicaContainer(), "ckpt/"},
	{"retention record", Lineage.ReplicaContainer(), "retention.json"},
	{"working copies", Lineage.FailoverContainer(), ""},
	{"catalogue", replica.CatalogueContainer, "policies/"},
	{"plans", replica.CatalogueContainer, "plans/"},
}

// containers makes them where the role may, and says who must where it may not.
func (t *trial) containers(ctx context.Context) error {
	for _, name := range []string{Lineage.JournalContainer(), Lineage.StagingContainer(), Lineage.ReplicaContainer(), Lineage.FailoverContainer(), replica.CatalogueContainer} {
		if t.rights.Allow(blobstore.MakeContainers, name, "") {
			if err := t.store.CreateContainer(ctx, name); err != nil {
				return fmt.Errorf("make container %s: %w", name, err)
			}
			continue
		}
		if !t.rights.Allow(blobstore.Read, name, "") {
			continue
		}
		_, err := t.store.Container(name).Stat(ctx, "validate/none", "")
		if errors.Is(err, blobstore.ErrNoContainer) {
			return fmt.Errorf("run `landfall storage validate` as role %s first, it makes the containers: %w", replica.RoleSchedule, err)
		}
		if err != nil && !errors.Is(err, blobstore.ErrNotFound) && !errors.Is(err, blobstore.ErrPermission) {
			return fmt.Errorf("read container %s: %w", name, err)
		}
	}
	t.report.add("containers", OK, "", "the containers of the trial are there")
	return nil
}

// name is a blob's name at a place.
func (t *trial) name(prefix string) string {
	if strings.HasSuffix(prefix, ".json") {
		return prefix + ".validate-" + t.tx // the right is for a prefix; the record itself is left alone
	}
	return prefix + "validate-" + t.tx + "/x"
}

// permissions tries each right at each place: what the role needs must work, and what it does not need should not.
func (t *trial) permissions(ctx context.Context) {
	var good, bad int
	var beyond []string
	for _, p := range places {
		c, name := t.store.Container(p.container), t.name(p.prefix)
		var extra []string
		attempt := func(action blobstore.Action, do func() error) {
			needed := t.rights.Allow(action, p.container, name)
			what := fmt.Sprintf("%s: %s", p.what, action)
			err := do()
			if errors.Is(err, blobstore.ErrNotFound) {
				err = nil // who may not is not told what exists
			}
			switch {
			case errors.Is(err, blobstore.ErrWriteOnce): // forbidden, whoever asks
				good++
			case needed && err != nil:
				bad++
				t.report.add(what, Fail, fmt.Sprintf("Give role %s the right to %s in %s%s.", t.o.Role, action, p.container[:min(4, len(p.container))], condition(p.prefix)), "%v", err)
			case needed, errors.Is(err, blobstore.ErrPermission):
				good++
			case err == nil:
				extra = append(extra, action.String())
			default:
				t.report.add(what, Warn, "", "%v", err)
			}
		}
		put := func(cond blobstore.Conditions) error {
			body := []byte("landfall storage validate\n")
			_, err := c.Put(ctx, name, bytes.NewReader(body), int64(len(body)), cond)
			return err
		}
		attempt(blobstore.Read, func() error { _, err := c.Stat(ctx, name, ""); return err })
		created := false
		attempt(blobstore.Create, func() error {
			err := put(blobstore.Conditions{CreateOnly: true})
			created = err == nil
			return err
		})
		if created {
			t.made = append(t.made, [2]string{p.container, name})
			attempt(blobstore.Write, func() error { return put(blobstore.Conditions{}) })
		}
		attempt(blobstore.Delete, func() error {
			err := c.Delete(ctx, name, blobstore.Conditions{})
			if err == nil && created {
				t.made = t.made[:len(t.made)-1]
			}
			return err
		})
		if len(extra) > 0 {
			beyond = append(beyond, fmt.Sprintf("%s (%s)", p.what, strings.Join(extra, ", ")))
		}
	}
	if bad == 0 {
		t.report.add("rights", OK, "", "what role %s needs is allowed (%d tries)", t.o.Role, good)
	}
	if len(beyond) > 0 {
		t.report.add("rights beyond the role", Warn, fmt.Sprintf("Give role %s an identity of its own without these rights: it never needs them, and who steals it has them.", t.o.Role),
			"%s", strings.Join(beyond, ", "))
	}
}

func condition(prefix string) string {
	if prefix == "" {
		return "…"
	}
	return "… for blobs whose path begins with " + prefix
}

// clean deletes what is left and may be deleted, and lists the rest.
func (t *trial) clean(ctx context.Context) {
	for _, m := range t.made {
		if err := t.store.Container(m[0]).Delete(ctx, m[1], blobstore.Conditions{}); err != nil && !errors.Is(err, blobstore.ErrNotFound) {
			t.report.Left = append(t.report.Left, m[0]+"/"+m[1])
		}
	}
}
