package cli

import (
	"encoding/json"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/storagecheck"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func (a *app) storageCommand() *cobra.Command {
	c := &cobra.Command{Use: "storage", Short: "Work with the storage account itself", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	c.AddCommand(a.storageValidateCommand())
	return c
}

func (a *app) storageValidateCommand() *cobra.Command {
	var role string
	var writeOnce time.Duration
	var size int64
	roles := make([]string, 0, len(replica.Roles()))
	for _, r := range replica.Roles() {
		roles = append(roles, string(r))
	}
	c := &cobra.Command{
		Use: "validate --store URL --role ROLE", Short: "Try a store as one role before first use", Args: cobra.NoArgs,
		Long: `Tries the store with the credentials that are given: whether it answers, whether the
role may do what it must and nothing more, whether every operation behaves as a replica needs
it, how fast it is, how far the clocks are apart, whether journals are write-once, and how the
account is set up (versioning off, soft delete on). Says what to change. Exit code 1 when something
must be changed before use.

Each service works as a role of its own. Run this once as each, with that role's credentials,
role schedule first: it makes the containers that the others try. They belong to a machine that
does not exist, and what a role may not delete again stays there.

Credentials come from --config FILE (section store), from variables such as
LANDFALL_STORE__AZURE__SAS, or from flags such as --store.azure.tenant (docs/operations/storage.md
lists them).`,
		Example: "  landfall storage validate --store https://contosodr.blob.core.windows.net --role schedule --store.azure.credential managed-identity\n" +
			"  landfall storage validate --config uploader.yaml --role ship\n  landfall storage validate --store ./state/store --role apply",
	}
	settings := storeFlags(c, "store", "storage account, https://ACCOUNT.blob.core.windows.net, or folder")
	f := c.Flags()
	f.StringVar(&role, "role", "", "role to try: "+strings.Join(roles, ", "))
	f.DurationVar(&writeOnce, "write-once", 0, "write-once policy that journals must have, as in the policies")
	f.Int64Var(&size, "mib", 32, "MiB to send for the rates; 0 sends none")
	_ = c.MarkFlagRequired("role")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		s, err := settings()
		if err != nil {
			return err
		}
		store, err := openStore(cmd.Context(), s)
		if err != nil {
			return err
		}
		defer store.Close()
		bytes := size << 20
		if size <= 0 {
			bytes = -1
		}
		report, err := storagecheck.Run(cmd.Context(), store, storagecheck.Options{Role: replica.Role(role), WriteOnce: writeOnce, Bytes: bytes, Clock: time.Now})
		if err != nil {
			return storeError(err, "validate the store as role %s", role)
		}
		if err := a.printChecks(report); err != nil {
			return err
		}
		if report.Failed() {
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_STORAGE_NOT_READY, "the store cannot be used as role %s yet: change what is marked fail", role)
		}
		return nil
	}
	return c
}

func (a *app) printChecks(r *storagecheck.Report) error {
	if a.format != "table" {
		raw, err := json.Marshal(r)
		if err != nil {
			return fmt.Errorf("encode output: %w", err)
		}
		var v any
		if err := json.Unmarshal(raw, &v); err != nil {
			return fmt.Errorf("encode output: %w", err)
		}
		return a.printValue(v)
	}
	w := tabwriter.NewWriter(a.out, 0, 4, 2, ' ', 0)
	row(w, "RESULT", "CHECK", "FOUND")
	for _, c := range r.Checks {
		row(w, c.Result, c.Name, c.Found)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	var changes []string
	for _, c := range r.Checks {
		if c.Change != "" {
			changes = append(changes, fmt.Sprintf("%s: %s", c.Name, c.Change))
		}
	}
	if len(changes) > 0 {
		fmt.Fprintf(a.out, "\nTo change:\n- %s\n", strings.Join(changes, "\n- "))
	}
	if len(r.Left) > 0 {
		fmt.Fprintf(a.out, "\nLeft in the store, which this role may not delete:\n- %s\n", strings.Join(r.Left, "\n- "))
	}
	return nil
}
