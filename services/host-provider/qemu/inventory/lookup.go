package inventory

import (
	"cmp"
	"context"
	"path/filepath"
	"slices"
	"strings"

	"github.com/landfall-dr/landfall/libs/errcat"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Lookup returns one machine by GUID (lower case), as it was last seen. VM_NOT_FOUND, or UNAVAILABLE until Refresh
// succeeded once.
func (i *Inventory) Lookup(id string) (*Machine, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if err := i.looked(); err != nil {
		return nil, err
	}
	if e := byID(i.entries, id); e != nil {
		return e.machine, nil
	}
	return nil, i.unknown(id)
}

// All returns every machine of which it is known who it is, by name, then id.
func (i *Inventory) All() []*Machine {
	i.mu.Lock()
	defer i.mu.Unlock()
	var out []*Machine
	for _, e := range i.entries {
		if e.machine != nil && e.machine.ID != "" && byID(i.entries, e.machine.ID) == e {
			out = append(out, e.machine)
		}
	}
	slices.SortFunc(out, func(a, b *Machine) int { return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.ID, b.ID)) })
	return out
}

// Find returns one machine by GUID or by a name that is unique on the host. VM_NOT_FOUND; UNAVAILABLE until Refresh
// succeeded once; the reason of what is wrong with one that is here and cannot be described.
func (i *Inventory) Find(vm string) (*Machine, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if err := i.looked(); err != nil {
		return nil, err
	}
	e, err := i.pick(vm)
	if err != nil {
		return nil, err
	}
	if e.machine == nil || e.machine.Description == nil {
		return nil, problem(e.findings)
	}
	return e.machine, nil
}

// Problems are the findings of SEVERITY_ERROR of the last look, and the machines that have them. A machine that was
// described before and whose QEMU does not answer has none: it may just be off.
func (i *Inventory) Problems() ([]*hostproviderv1.Finding, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if err := i.looked(); err != nil {
		return nil, err
	}
	var out []*hostproviderv1.Finding
	for _, e := range i.entries {
		off := e.machine != nil && e.machine.Description != nil
		for _, f := range errorsOf(e.findings) {
			if f.Check != checkMonitor || !off {
				out = append(out, f)
			}
		}
	}
	return out, nil
}

// Check looks afresh at every machine, since they may contradict each other, and returns all findings of one. The machine
// is nil when it cannot be described; answered says that its QEMU described it just now.
func (i *Inventory) Check(ctx context.Context, vm string) (m *Machine, findings []*hostproviderv1.Finding, answered bool, err error) {
	if err := i.Refresh(ctx); err != nil {
		return nil, nil, false, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	e, err := i.pick(vm)
	if err != nil {
		return nil, nil, false, err
	}
	if e.machine != nil && e.machine.Description != nil {
		m = e.machine
	}
	return m, slices.Clone(e.findings), e.answered, nil
}

// looked is an error until the folder was looked at once: a host that is starting has not lost its machines.
func (i *Inventory) looked() error {
	if i.ready {
		return nil
	}
	return errcat.New(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, "host %s is still looking for its machines", i.o.Host)
}

// pick finds the entry that vm means: a GUID, a name, or, where nobody can tell who it is, the name of the file.
func (i *Inventory) pick(vm string) (*entry, error) {
	if e := byID(i.entries, strings.ToLower(vm)); e != nil {
		return e, nil
	}
	var named []*entry
	for _, e := range i.entries {
		nameless := e.machine == nil || e.machine.Description == nil
		if e.label() == vm || nameless && (e.def.label == vm || filepath.Base(e.def.path) == vm) {
			named = append(named, e)
		}
	}
	switch len(named) {
	case 0:
		return nil, i.unknown(vm)
	case 1:
		return named[0], nil
	}
	return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, "more than one machine on host %s is called %q: use the id", i.o.Host, vm).With("vm", vm)
}

// byID prefers, among machines that share an id, the one that nothing is against.
func byID(entries []*entry, id string) (found *entry) {
	for _, e := range entries {
		if e.machine == nil || e.machine.ID == "" || e.machine.ID != id {
			continue
		}
		if found == nil || found.machine.Problem != nil && e.machine.Problem == nil {
			found = e
		}
	}
	return found
}

func (i *Inventory) unknown(vm string) error {
	return errcat.New(typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, "host %s has no machine %q", i.o.Host, vm).With("vm", vm)
}
