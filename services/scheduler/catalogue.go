package scheduler

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/catalogue"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
)

// cataloguing mirrors VMs and policies to storage while this process holds the lease (libs/catalogue). Nothing waits for
// it. It watches the records itself, and hears of a VM only when something changes that storage is to know: records
// change with every cycle.
type cataloguing struct {
	store  *store
	mirror *catalogue.Mirror

	mu   sync.Mutex
	vms  map[string]*catalogue.VM // as seen last, by key
	gone map[string]bool          // keys of records that were seen to be deleted, "policy " before those of policies
}

// ofPolicy is the key of a policy in gone.
func ofPolicy(key string) string { return "policy " + key }

// catalogued runs the mirror until ctx ends.
func (r *reconciler) catalogued(ctx context.Context) error {
	c := &cataloguing{store: r.store, vms: map[string]*catalogue.VM{}, gone: map[string]bool{}}
	c.mirror = catalogue.NewMirror(catalogue.MirrorOptions{
		Catalogue: catalogue.Open(r.blobs), Source: c, Prefixes: []string{"sites/", "policies/"}, Timeout: r.cfg.StorageTimeout, Now: r.now, Logger: r.log,
	})
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var watching sync.WaitGroup
	current := make(chan error, 2)
	problems := make(chan error, 2)
	watching.Go(func() { problems <- c.watchVMs(ctx, current) })
	watching.Go(func() { problems <- c.watchPolicies(ctx, current) })
	var seen error
	for range 2 { // evidence of what ended first
		seen = errors.Join(seen, <-current)
	}
	mirroring := make(chan struct{})
	go func() {
		defer close(mirroring)
		if seen == nil {
			c.mirror.Run(ctx)
		}
	}()
	err := <-problems
	cancel()
	watching.Wait()
	<-mirroring
	return err
}

// watchVMs tells the mirror of protections. current hears once that everything was seen, or why not.
func (c *cataloguing) watchVMs(ctx context.Context, current chan<- error) error {
	told := false
	for u, err := range c.store.vms.Watch(ctx, "") {
		if err != nil {
			if !told {
				current <- err
			}
			return fmt.Errorf("watch the records for the catalogue: %w", err)
		}
		switch u.Kind {
		case bus.Put:
			c.protected(u.Key, catalogued(u.Value))
		case bus.Deleted:
			c.protected(u.Key, nil)
		case bus.Current:
			told = true
			current <- nil
		}
	}
	return nil
}

// protected notes what a VM's record says; nil when it was deleted.
func (c *cataloguing) protected(key string, now *catalogue.VM) {
	c.mu.Lock()
	was := c.vms[key]
	if now == nil {
		c.gone[key] = true
		delete(c.vms, key)
	} else {
		delete(c.gone, key)
		c.vms[key] = now
	}
	c.mu.Unlock()
	for _, vm := range []*catalogue.VM{was, now} {
		if vm != nil && (was == nil || now == nil || *was != *now) {
			c.mirror.Touch(catalogue.VMName(vm.Site, vm.ID, vm.Lineage))
		}
	}
}

// watchPolicies tells the mirror of policies.
func (c *cataloguing) watchPolicies(ctx context.Context, current chan<- error) error {
	told := false
	for u, err := range c.store.policies.Watch(ctx, "") {
		if err != nil {
			if !told {
				current <- err
			}
			return fmt.Errorf("watch the policies for the catalogue: %w", err)
		}
		if u.Kind == bus.Current {
			told = true
			current <- nil
			continue
		}
		c.mu.Lock()
		if u.Kind == bus.Deleted {
			c.gone[ofPolicy(u.Key)] = true
		} else {
			delete(c.gone, ofPolicy(u.Key))
		}
		c.mu.Unlock()
		if parts, err := bus.KeyParts(u.Key); err == nil && len(parts) == 1 {
			c.mirror.Touch(catalogue.PolicyName(parts[0]))
		}
	}
	return nil
}

// catalogued is what storage is to know of a VM.
func catalogued(vm *schedulerv1.ProtectedVm) *catalogue.VM {
	out := &catalogue.VM{
		Site: siteOf(vm.GetName()), ID: lastPart(vm.GetName()), DisplayName: vm.GetDisplayName(), Lineage: vm.GetLineage(),
		Host: vm.GetHost(), Policy: vm.GetPolicy(),
	}
	if t := vm.GetCreateTime(); t != nil {
		out.Created = t.AsTime().Truncate(time.Millisecond)
	}
	return out
}

// Names implements catalogue.Source.
func (c *cataloguing) Names(ctx context.Context) ([]string, error) {
	var names []string
	vms, err := c.store.vms.List(ctx, "")
	if err != nil {
		return nil, err
	}
	for _, e := range vms {
		vm := catalogued(e.Value)
		names = append(names, catalogue.VMName(vm.Site, vm.ID, vm.Lineage))
	}
	policies, err := c.store.policies.List(ctx, "")
	if err != nil {
		return nil, err
	}
	for _, e := range policies {
		names = append(names, catalogue.PolicyName(e.Value.GetName()))
	}
	return names, nil
}

// Truth implements catalogue.Source. A protection ended when the VM's record was deleted, or is of another lineage now.
func (c *cataloguing) Truth(ctx context.Context, name string) (catalogue.Truth, error) {
	if policy, ok := strings.CutPrefix(name, "policies/"); ok {
		policy, _ = strings.CutSuffix(policy, ".json")
		p, _, err := c.store.policies.Get(ctx, bus.Key(policy))
		if errors.Is(err, bus.ErrNotFound) {
			return c.ended(ofPolicy(bus.Key(policy))), nil
		}
		if err != nil {
			return catalogue.Truth{}, err
		}
		p = proto.CloneOf(p)
		p.Revision = 0
		return catalogue.Truth{Record: &catalogue.Record{Policy: p}}, nil
	}
	site, id, lineage, ok := catalogue.ParseVMName(name)
	if !ok {
		return catalogue.Truth{}, nil
	}
	vm, _, err := c.store.vms.Get(ctx, vmKey(site, id))
	switch {
	case errors.Is(err, bus.ErrNotFound):
		return c.ended(vmKey(site, id)), nil
	case err != nil:
		return catalogue.Truth{}, err
	case vm.GetLineage() != lineage:
		return catalogue.Truth{Ended: true}, nil
	}
	return catalogue.Truth{Record: &catalogue.Record{VM: catalogued(vm)}}, nil
}

// ended says whether a record that is not there was seen to be deleted.
func (c *cataloguing) ended(key string) catalogue.Truth {
	c.mu.Lock()
	defer c.mu.Unlock()
	return catalogue.Truth{Ended: c.gone[key]}
}

// forgetPolicy ends a policy that only storage knows, when somebody asks to delete it. It is best effort: storage may be away.
func (s *Service) forgetPolicy(ctx context.Context, name string) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.CallTimeout)
	defer cancel()
	c := catalogue.Open(s.deps.Store)
	have, version, err := c.Get(ctx, catalogue.PolicyName(name))
	if err == nil && have != nil && have.Ended.IsZero() {
		have.Ended = s.now().UTC().Truncate(time.Millisecond)
		have.Written = have.Ended
		_, err = c.Put(ctx, have, version)
	}
	if err != nil {
		s.log.WarnContext(ctx, "a policy that only the catalogue in storage may know was not ended there", "policy", name, "error", err)
	}
}
