package scheduler

import (
	"strings"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// vmName is the resource name of a VM.
func vmName(site, vm string) string { return "sites/" + site + "/vms/" + vm }

// splitVM takes sites/{site}/vms/{vm} apart. A bare {vm} has no site: it is looked for in all.
func splitVM(name string) (site, vm string, err error) {
	parts := strings.Split(name, "/")
	switch {
	case len(parts) == 1 && parts[0] != "":
		return "", parts[0], nil
	case len(parts) == 4 && parts[0] == "sites" && parts[2] == "vms" && parts[1] != "" && parts[3] != "":
		return parts[1], parts[3], nil
	}
	return "", "", errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT,
		"%q is not the name of a VM: want sites/SITE/vms/VM", name).With("vm", name)
}

// vmKey is the key of a VM's record.
func vmKey(site, vm string) string { return bus.Key(site, vm) }

// keyOf is the key of the record that has that resource name.
func keyOf(name string) string {
	site, vm, err := splitVM(name)
	if err != nil || site == "" {
		return ""
	}
	return vmKey(site, vm)
}

// lastPart is what stands after the last slash: the id in a resource name.
func lastPart(name string) string { return name[strings.LastIndexByte(name, '/')+1:] }

// siteOf is the site in a resource name.
func siteOf(name string) string {
	if parts := strings.Split(name, "/"); len(parts) > 1 && parts[0] == "sites" {
		return parts[1]
	}
	return ""
}
